/* What the kernels of several rooms are made of: vectors, exponentials, and a product of a few rows with a panel of a matrix.
 *
 * Plain C with the vector extensions of GCC and Clang, in float, or in double with -DREAL=double, which exists to be exact. A sum runs in the
 * order of its own terms, so a row's numbers do not depend on the rows beside it.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef REAL
#define REAL float
#define SINGLE
#define WHOLE int32_t
#else
#define WHOLE int64_t
#endif
#ifndef LANES /* floats in a vector */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#ifdef SINGLE
#define W LANES
#else
#define W (LANES / 2)
#endif
#if LANES == 16
#define R 12 /* rows of one tile: R x 2 sums stay in registers */
#else
#define R 6
#endif
#define P (2 * W)    /* columns of a panel */
#define DEEP 256     /* inputs of a panel that are met at once: they stay in the first cache */
#define AHEAD 64     /* steps by which a panel is asked of memory before it is met */
#define ALWAYS static inline __attribute__((always_inline))

typedef REAL real;
typedef real vf __attribute__((vector_size(W * sizeof(real))));
typedef real vfu __attribute__((vector_size(W * sizeof(real)), aligned(sizeof(real))));
typedef WHOLE vi __attribute__((vector_size(W * sizeof(real))));

ALWAYS vf load(const real *x) { return *(const vfu *)x; }
ALWAYS void store(real *x, vf v) { *(vfu *)x = v; }
ALWAYS vf splat(real x) { return x - (vf){0}; }
ALWAYS vf either(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

ALWAYS real total(vf v) {
    real s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}

ALWAYS real highest(vf v) {
    real s = v[0];
    for (int i = 1; i < W; i++) s = v[i] > s ? v[i] : s;
    return s;
}

/* exp(x) for x <= 88 within 2 units in the last place; 0 below -87. NaN stays NaN. */
ALWAYS vf exponential(vf x) {
#ifdef SINGLE
    vf y = either(x < -87.0f, splat(-87.0f), either(x > 88.0f, splat(88.0f), x));
    vf n = (y * 1.44269504f + 12582912.0f) - 12582912.0f; /* the nearest whole number */
    vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return either(x < -87.0f, (vf){0}, p * scale);
#else
    for (int i = 0; i < W; i++) x[i] = exp(x[i]);
    return x;
#endif
}

ALWAYS int64_t padded(int64_t n) { return (n + P - 1) / P * P; }
/* From one row to the next: rows a power of two apart would fight for the same lines of the cache. */
ALWAYS int64_t stride(int64_t n) { return padded(n) + P; }

/* Ask memory for the lines of a step of a panel. */
ALWAYS void ask(const void *w) {
    for (int i = 0; i < P * 4; i += 64) __builtin_prefetch((const char *)w + i);
}

/* out[r, 0..P) = (or += where `add`) the sum over i of x[r * rs + i * ks] w[i, 0..P) for n rows. */
ALWAYS void tile(const int n, const real *x, const int64_t rs, const int64_t ks, const real *w, int64_t k, real *out, int64_t ldo, const int add) {
    vf sum[R][2];
    for (int r = 0; r < n; r++) sum[r][0] = sum[r][1] = (vf){0};
    for (int64_t i = 0; i < k; i++) {
        vf a = load(w + i * P), b = load(w + i * P + W);
        ask(w + (i + AHEAD) * P);
        for (int r = 0; r < n; r++) {
            real one = x[r * rs + i * ks];
            sum[r][0] += one * a;
            sum[r][1] += one * b;
        }
    }
    for (int r = 0; r < n; r++) {
        store(out + r * ldo, add ? load(out + r * ldo) + sum[r][0] : sum[r][0]);
        store(out + r * ldo + W, add ? load(out + r * ldo + W) + sum[r][1] : sum[r][1]);
    }
}

#define CASE(F, N, ...) case N: F(N, __VA_ARGS__); break;
#if R > 6
#define MORE(F, ...) CASE(F, 7, __VA_ARGS__) CASE(F, 8, __VA_ARGS__) CASE(F, 9, __VA_ARGS__) CASE(F, 10, __VA_ARGS__) CASE(F, 11, __VA_ARGS__) \
    CASE(F, 12, __VA_ARGS__)
#else
#define MORE(F, ...)
#endif
/* F of a known number of rows, so that its sums stay in registers. */
#define TILES(F, N, ...) switch (N) { CASE(F, 1, __VA_ARGS__) CASE(F, 2, __VA_ARGS__) CASE(F, 3, __VA_ARGS__) CASE(F, 4, __VA_ARGS__) \
    CASE(F, 5, __VA_ARGS__) CASE(F, 6, __VA_ARGS__) MORE(F, __VA_ARGS__) }

/* Rows of x [n, ldx] with one panel: out[n, P] = or += x[n, k] w, in tiles as even as can be. */
static inline void panel(int n, const real *x, int64_t ldx, const real *w, int64_t k, real *out, int64_t ldo, int add) {
    int count = (n + R - 1) / R;
    for (int64_t from = 0; from < k; from += DEEP) {
        int64_t some = k - from < DEEP ? k - from : DEEP;
        for (int t = 0; t < count; t++) {
            int first = (int)((int64_t)n * t / count), last = (int)((int64_t)n * (t + 1) / count);
            const real *rows = x + first * ldx + from;
            if (add || from) { TILES(tile, last - first, rows, ldx, 1, w + from * P, some, out + first * ldo, ldo, 1) }
            else { TILES(tile, last - first, rows, ldx, 1, w, some, out + first * ldo, ldo, 0) }
        }
    }
}
