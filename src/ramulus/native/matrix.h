/* Products of bfloat16 by the matrix unit of x86 (AMX), where the compiler knows it and processor and kernel allow it; else by vectors.
 *
 * The unit sums 16 rows x 16 columns x 32 inputs in one instruction, and reads panels as they lie, of each step of
 * 32 inputs 16 lines of pairs.
 * What a row's numbers are does not depend on the rows beside it. cells.h includes this.
 */
#if defined(DOTS) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(UNTILED) /* for tests: as one without it does it */
#define MATRIX
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16          /* rows and columns of a block */
#define STEP (2 * SIDE)  /* inputs of one instruction */
#define FAR (36 * STEP * P * (int64_t)sizeof(cell)) /* bytes by which a panel is asked of memory before it is met */
#ifndef PERMISSION /* for tests: a number that the kernel refuses */
#define PERMISSION 0x1023
#endif
#define TILE_DATA 18

/* Whether the unit may be used: its state is large, so a process asks the kernel for it. */
static int matrix(void) {
    static int known; /* 0: not asked yet; threads that ask at once get the same answer */
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!answer) __atomic_store_n(&known, answer = syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) ? -1 : 1, __ATOMIC_RELAXED);
    return answer > 0;
}

/* Sums of two blocks of rows (upper, lower) with two of columns in registers 0 to 3, rows of x in 4 and 5, lines of the panel in 6 and 7. */
static void lay(int upper, int lower, int inputs) {
    struct { uint8_t palette, row, nothing[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = i == 4 || i == 5 ? inputs * sizeof(cell) : SIDE * sizeof(word);
    for (int i = 0; i < 6; i++) shape.rows[i] = i == 2 || i == 3 || i == 5 ? lower : upper;
    shape.rows[6] = shape.rows[7] = inputs / PAIR;
    _tile_loadconfig(&shape);
}

/* What is met: lines of pairs of columns, `line` bytes apart; panels of P columns, `apart` bytes; `ahead`: bytes by which the first is asked of memory. */
typedef struct { const char *at; int64_t line, apart, panels, ahead; } Lines;

/* out[rows, P] = (or += where `add`) x[rows, k] w, for the rows and the steps of `inputs` that the registers are laid for. Two blocks of rows in turn
 * ask memory for a half each of what comes. */
ALWAYS void blocks(const int two, const cell *x, int64_t ldx, const char *w, const Lines *lines, int64_t half, int64_t k, int inputs, float *out,
                   int64_t ldo, const int add) {
    const int64_t x_line = ldx * sizeof(cell), out_line = ldo * sizeof(float), step = inputs / PAIR * lines->line;
    const int asked = two ? SIDE : 2 * SIDE;
    float *low = out + SIDE * ldo;
    __asm__ volatile("" ::: "memory"); /* what was stored may be read by the unit */
    if (add) {
        _tile_loadd(0, out, out_line);
        _tile_loadd(1, out + W, out_line);
        if (two) _tile_loadd(2, low, out_line);
        if (two) _tile_loadd(3, low + W, out_line);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (two) _tile_zero(2);
        if (two) _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += inputs, w += step) {
        if (lines->ahead)
            for (int j = 0; j < asked; j++) __builtin_prefetch(w + lines->ahead + (half * SIDE + j) * 64, 0, 2); /* into the second cache */
        _tile_loadd(6, w, lines->line);
        _tile_loadd(4, x + i, x_line);
        _tile_loadd(7, w + W * sizeof(word), lines->line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, x + SIDE * ldx + i, x_line);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_line);
    _tile_stored(1, out + W, out_line);
    if (two) _tile_stored(2, low, out_line);
    if (two) _tile_stored(3, low + W, out_line);
}

/* The blocks of n rows with all panels, in equal steps of `inputs`. */
static void by_blocks(int n, const cell *x, int64_t ldx, Lines w, int64_t k, int inputs, float *out, int64_t ldo, int add) {
    for (int r = 0, rows; r < n; r += rows) {
        rows = n - r < 2 * SIDE ? n - r : 2 * SIDE;
        if (r >= 4 * SIDE) w.ahead = 0; /* asked for already */
        if (!r || rows < 2 * SIDE) lay(rows < SIDE ? rows : SIDE, rows > SIDE ? rows - SIDE : 1, inputs);
        for (int64_t p = 0; p < w.panels; p++) {
            const cell *from = x + r * ldx;
            const char *at = w.at + p * w.apart;
            float *to = out + r * ldo + p * P;
            if (rows > SIDE) blocks(1, from, ldx, at, &w, r / (2 * SIDE) % 2, k, inputs, to, ldo, add);
            else blocks(0, from, ldx, at, &w, 0, k, inputs, to, ldo, add);
        }
    }
}

/* out[n, P * panels] = or += x[n, k] w; k is even. */
static void by_matrix(int n, const cell *x, int64_t ldx, Lines w, int64_t k, float *out, int64_t ldo, int add) {
    int64_t steps = (k + STEP - 1) / STEP, whole = k % (PAIR * steps) ? k / STEP * STEP : k;
    if (whole) by_blocks(n, x, ldx, w, whole, whole == k ? (int)(k / steps) : STEP, out, ldo, add);
    if (k > whole) {
        w.at += whole / PAIR * w.line;
        by_blocks(n, x + whole, ldx, w, k - whole, (int)(k - whole), out, ldo, add || whole);
    }
    _tile_release();
}
#endif
