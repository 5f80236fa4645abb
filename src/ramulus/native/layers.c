/* What lies between the products of a transformer's layers, forward and backward, and its head, for a CPU: in bfloat16, met and summed in float.
 *
 * Rows lie together; widths are whole vectors. learn/policy/half_kernels.py calls it.
 */
#define BFLOAT
#include "cells.h"

#define COLUMNS (16 * P) /* of the head, whose scores stay in the first cache */

ALWAYS vf met(const void *x, int64_t at, const int wide) { return wide ? load((const real *)x + at) : widen((const cell *)x + at); }
ALWAYS void put(void *x, int64_t at, vf v, const int wide) {
    if (wide) store((real *)x + at, v);
    else narrow((cell *)x + at, v);
}
ALWAYS vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

ALWAYS real norm_row(const void *x, const real *weight, int64_t width, real eps, cell *out, const int wide) {
    vf sum = {0};
    for (int64_t i = 0; i < width; i += W) {
        vf v = met(x, i, wide);
        sum += v * v;
    }
    real inverse = 1 / sqrtf(total(sum) / width + eps);
    for (int64_t i = 0; i < width; i += W) narrow(out + i, met(x, i, wide) * inverse * load(weight + i));
    return inverse;
}

/* out = weight * x / rms(x) and 1 / rms(x) of each row; x is of floats (wide) or bfloat16. */
void ramulus_norm(int64_t rows, int64_t width, int64_t wide, int64_t threads, double eps, const void *x, const real *weight, cell *out, real *inverse) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        inverse[r] = wide ? norm_row((const real *)x + r * width, weight, width, (real)eps, out + r * width, 1)
                          : norm_row((const cell *)x + r * width, weight, width, (real)eps, out + r * width, 0);
}

/* With n = x / rms and g = weight * given: dx = (g - n mean(g n)) / rms, and dweight += given n. */
ALWAYS void norm_back(const void *x, const real *weight, real inverse, const cell *given, int64_t width, void *dx, real *dweight, const int wide) {
    vf sum = {0};
    for (int64_t i = 0; i < width; i += W) {
        vf along = met(x, i, wide) * inverse * widen(given + i);
        sum += along * load(weight + i);
        store(dweight + i, load(dweight + i) + along);
    }
    real mean = total(sum) / width * inverse;
    for (int64_t i = 0; i < width; i += W) put(dx, i, (widen(given + i) * load(weight + i) - met(x, i, wide) * mean) * inverse, wide);
}

/* dx as wide as x, and dweight [threads, width], zeros before. */
void ramulus_norm_backward(int64_t rows, int64_t width, int64_t wide, int64_t threads, const void *x, const real *weight, const real *inverse,
                           const cell *given, void *dx, real *dweight) {
#pragma omp parallel num_threads(threads)
    {
        int64_t mine = 0, many = 1;
#ifdef _OPENMP
        mine = omp_get_thread_num(), many = omp_get_num_threads();
#endif
        real *sums = dweight + mine * width;
        for (int64_t r = rows * mine / many; r < rows * (mine + 1) / many; r++) {
            int64_t at = r * width;
            if (wide) norm_back((const real *)x + at, weight, inverse[r], given + at, width, (real *)dx + at, sums, 1);
            else norm_back((const cell *)x + at, weight, inverse[r], given + at, width, (cell *)dx + at, sums, 0);
        }
    }
}

/* both [rows, 2 width], gate beside up -> silu(gate) * up [rows, width] */
void ramulus_gated(int64_t rows, int64_t width, int64_t threads, const cell *both, cell *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const cell *gate = both + 2 * r * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += W) {
            vf g = widen(gate + i);
            narrow(out + r * width + i, g * sigmoid(g) * widen(up + i));
        }
    }
}

/* The same once more in `out`, and from the gradient `given` [rows, width] of it that of both. */
void ramulus_gated_backward(int64_t rows, int64_t width, int64_t threads, const cell *both, const cell *given, cell *out, cell *dboth) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const cell *gate = both + 2 * r * width, *up = gate + width;
        cell *dgate = dboth + 2 * r * width, *dup = dgate + width;
        for (int64_t i = 0; i < width; i += W) {
            vf g = widen(gate + i), u = widen(up + i), d = widen(given + r * width + i), s = sigmoid(g);
            narrow(out + r * width + i, g * s * u);
            narrow(dgate + i, d * u * s * (1.0f + g * (1.0f - s)));
            narrow(dup + i, d * g * s);
        }
    }
}

/* Rotate the first `heads` heads of each row [all, dim] in place by the angles of its position, cos and sin [rows, dim]; or back. */
void ramulus_rotate(int64_t rows, int64_t heads, int64_t all, int64_t dim, int64_t back, int64_t threads, const real *cos, const real *sin, cell *x) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const real *c = cos + r * dim, *s = sin + r * dim;
        for (int64_t h = 0; h < heads; h++) {
            cell *low = x + (r * all + h) * dim, *high = low + half;
            for (int64_t i = 0; i < half; i += W) {
                vf a = widen(low + i), b = widen(high + i);
                vf ca = load(c + i), cb = load(c + half + i), sa = load(s + i), sb = load(s + half + i);
                narrow(low + i, back ? a * ca + b * sb : a * ca - b * sa);
                narrow(high + i, back ? b * cb - a * sa : b * cb + a * sb);
            }
        }
    }
}

/* What the head is asked: rows x of bfloat16 [rows, width], its weights in panels [padded words / P][width / 2][P][2], of which `words` are drawn. */
typedef struct { int64_t rows, width, words, threads; const cell *x, *panels; } Head;

/* scores [rows, line], where a row holds padded(words) numbers; -inf beyond the words. */
static void scores_of(const Head *h, real scale, real *scores, int64_t line) {
    int64_t last = padded(h->words);
#pragma omp parallel for schedule(dynamic) num_threads(h->threads)
    for (int64_t c = 0; c < last; c += P) {
        gain((int)h->rows, h->x, h->width, h->panels + c * h->width, h->width, scores + c, line, 0);
        for (int64_t r = 0; r < h->rows; r++) {
            real *row = scores + r * line;
            if (scale != 1) store(row + c, load(row + c) * scale), store(row + c + W, load(row + c + W) * scale);
            for (int64_t j = h->words > c ? h->words : c; j < c + P; j++) row[j] = -INFINITY;
        }
    }
}

/* The logarithm of the sum of exp(by x) over a row, and the entropy of that distribution. */
static real level(const real *x, int64_t count, real by, real *entropy) {
    vf top = load(x);
    for (int64_t j = W; j < count; j += W) {
        vf v = load(x + j);
        top = either(v > top, v, top);
    }
    real most = highest(top);
    double all = 0, mean = 0;
    for (int64_t from = 0; from < count; from += COLUMNS) {
        int64_t to = from + COLUMNS < count ? from + COLUMNS : count;
        vf sum = {0}, moment = {0};
        for (int64_t j = from; j < to; j += W) {
            vf v = (load(x + j) - most) * by, e = exponential(v);
            sum += e;
            moment += either(v < -87.0f, (vf){0}, e * v);
        }
        all += total(sum), mean += total(moment);
    }
    real log_all = (real)log(all);
    *entropy = (real)(log_all - mean / all);
    return most * by + log_all;
}

/* Of each row the log-prob of its token and the entropy, from scores times `by` [rows] (null: 1), and the level that `ramulus_pull` asks for. */
void ramulus_head_read(int64_t rows, int64_t words, int64_t line, int64_t threads, const real *scores, const int64_t *token, const real *by, real *logprob,
                       real *entropy, real *high) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        real factor = by ? by[r] : 1;
        high[r] = level(scores + r * line, padded(words), factor, entropy + r);
        logprob[r] = scores[r * line + token[r]] * factor - high[r];
    }
}

void ramulus_head_scores(const Head *h, double scale, real *scores, int64_t line) { scores_of(h, (real)scale, scores, line); }

/* What a step of the scores changes, in bfloat16 [rows, padded(words)]: the log-prob of the token (1 there, less p), or with `entropy` the entropy
 * (-p (log p + entropy)); in units of the scores times `by`. */
void ramulus_head_pull(int64_t rows, int64_t words, int64_t line, int64_t threads, const real *scores, const int64_t *token, const real *by,
                       const real *high, const real *entropy, cell *out) {
    int64_t last = padded(words);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const real *x = scores + r * line;
        cell *to = out + r * last;
        real factor = by ? by[r] : 1;
        for (int64_t j = 0; j < last; j += W) {
            vf log_p = load(x + j) * factor - high[r], p = exponential(log_p);
            narrow(to + j, entropy ? either(log_p < -87.0f, (vf){0}, -p * (log_p + entropy[r])) : -p);
        }
        if (!entropy) {
            vf one = splat(-expm1f(x[token[r]] * factor - high[r]));
            cell some[W];
            narrow(some, one);
            to[token[r]] = some[0];
        }
    }
}

int64_t ramulus_panel(void) { return P; }

/* Whether products of bfloat16 go through a matrix unit here. */
int64_t ramulus_matrix(void) {
#ifdef MATRIX
    return matrix();
#else
    return 0;
#endif
}
