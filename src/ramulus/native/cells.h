/* What weights, keys, values and the inputs of products are made of: floats, or with -DBFLOAT bfloat16, whose products are summed in float.
 *
 * In a panel of bfloat16 the inputs come in pairs: [inputs / 2][P][2]. A processor that has the instruction multiplies them as they are
 * (AVX512-BF16); others widen them to floats.
 */
#include "vectors.h"

#ifdef BFLOAT
#if defined(__AVX512BF16__) && W == 16 && !defined(WIDENED) /* for tests: as a processor without the instruction does it */
#include <immintrin.h>
#define DOTS
#endif
#define PAIR 2 /* inputs that lie beside each other in a panel */
#define CLOSE 64 /* rows that meet a panel one after the other, so that their inputs stay in the second cache */
typedef uint16_t cell;
typedef uint32_t word;
typedef cell cells __attribute__((vector_size(W * sizeof(cell)), aligned(sizeof(cell)), may_alias));
typedef word words __attribute__((vector_size(W * sizeof(word))));
typedef word wordsu __attribute__((vector_size(W * sizeof(word)), aligned(sizeof(cell)), may_alias));

ALWAYS vf widen(const cell *x) { return (vf)(__builtin_convertvector(*(const cells *)x, words) << 16); }

ALWAYS float single(const cell *x) {
    word bits = (word)*x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* The nearest bfloat16, ties to even. */
ALWAYS void narrow(cell *x, vf v) {
#ifdef DOTS
    *(cells *)x = (cells)_mm512_cvtneps_pbh((__m512)v);
#else
    words bits = (words)v, near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, broken = (words)(v != v);
    *(cells *)x = __builtin_convertvector((broken & 0x7FC0) | (~broken & near), cells);
#endif
}

ALWAYS vf lower(words pair) { return (vf)(pair << 16); }
ALWAYS vf upper(words pair) { return (vf)(pair & 0xFFFF0000u); }

/* sum + the two products of each lane of a and b, which hold a pair each. */
ALWAYS vf dots(vf sum, words a, words b) {
#ifdef DOTS
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + upper(a) * upper(b) + lower(a) * lower(b);
#endif
}

/* As `tile` of vectors.h. */
ALWAYS void tile_of_pairs(const int n, const cell *x, const int64_t rs, const cell *w, int64_t k, float *out, int64_t ldo, const int add) {
    vf sum[R][2];
    for (int r = 0; r < n; r++) sum[r][0] = sum[r][1] = (vf){0};
    for (int64_t i = 0; i < k; i += PAIR) {
        words a = *(const wordsu *)(w + i * P), b = *(const wordsu *)(w + i * P + PAIR * W);
        ask(w + (i + PAIR * AHEAD) * P);
        for (int r = 0; r < n; r++) {
            word one;
            memcpy(&one, x + r * rs + i, sizeof one);
            words both = one - (words){0};
            sum[r][0] = dots(sum[r][0], a, both);
            sum[r][1] = dots(sum[r][1], b, both);
        }
    }
    for (int r = 0; r < n; r++) {
        store(out + r * ldo, add ? load(out + r * ldo) + sum[r][0] : sum[r][0]);
        store(out + r * ldo + W, add ? load(out + r * ldo + W) + sum[r][1] : sum[r][1]);
    }
}

#include "matrix.h"

/* As `panel` of vectors.h: out[n, P] = or += x[n, k] w. Where k is odd, x and the panel have a zero behind it. */
static void gain(int n, const cell *x, int64_t ldx, const cell *w, int64_t k, float *out, int64_t ldo, int add) {
#ifdef MATRIX
    if (matrix()) {
        by_matrix(n, x, ldx, (Lines){(const char *)w, P * sizeof(word), 0, 1, FAR}, (k + 1) / PAIR * PAIR, out, ldo, add);
        return;
    }
#endif
    for (int row = 0; row < n; row += CLOSE) {
        int some_rows = n - row < CLOSE ? n - row : CLOSE, count = (some_rows + R - 1) / R;
        for (int64_t from = 0; from < k; from += PAIR * DEEP) {
            int64_t some = k - from < PAIR * DEEP ? k - from : PAIR * DEEP;
            for (int t = 0; t < count; t++) {
                int first = row + some_rows * t / count, last = row + some_rows * (t + 1) / count;
                const cell *rows = x + first * ldx + from;
                if (add || from) { TILES(tile_of_pairs, last - first, rows, ldx, w + from * P, some, out + first * ldo, ldo, 1) }
                else { TILES(tile_of_pairs, last - first, rows, ldx, w, some, out + first * ldo, ldo, 0) }
            }
        }
    }
}
#else
#define PAIR 1
typedef float cell;
ALWAYS vf widen(const cell *x) { return load(x); }
ALWAYS float single(const cell *x) { return *x; }
ALWAYS void narrow(cell *x, vf v) { store(x, v); }
ALWAYS void gain(int n, const cell *x, int64_t ldx, const cell *w, int64_t k, float *out, int64_t ldo, int add) { panel(n, x, ldx, w, k, out, ldo, add); }
#endif
