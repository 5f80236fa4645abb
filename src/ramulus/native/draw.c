/* One token a row from its logits, for a CPU and in float32: entropy, temperature, inverse CDF.
 *
 * engine/local/compiled.py calls it.
 */
#include "vectors.h"

#define SPAN 512 /* tokens of the vocabulary that are summed at once */

/* exp((x - most) / temperature) of some logits, -inf and what lies beyond `some` giving 0. */
ALWAYS void spread(const float *x, int64_t some, float most, float temperature, float *e) {
    for (int64_t i = 0; i < some; i += W) {
        vf v = splat(-INFINITY);
        if (some - i >= W) v = load(x + i);
        else for (int64_t j = 0; j < some - i; j++) v[j] = x[i + j];
        store(e + i, exponential((v - most) / temperature));
    }
}

/* The largest logit; where one is NaN, some number or NaN. */
static float peak(const float *x, int64_t n) {
    float most = x[0];
    int64_t i = 0;
    if (n >= W) {
        vf top = load(x);
        for (i = W; n - i >= W; i += W) top = either(load(x + i) > top, load(x + i), top);
        most = highest(top);
    }
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* The first place where it stands, or the last of all. */
static int64_t first(const float *x, int64_t n, float most) {
    int64_t i = 0;
    while (i + 1 < n && x[i] != most) i++;
    return i;
}

/* The sum of exponentials, and in `product` that of each times its distance from the largest logit. */
static double mass(const float *x, int64_t n, float most, float temperature, double *product) {
    float e[SPAN];
    double sum = 0, weighted = 0;
    for (int64_t a = 0; a < n; a += SPAN) {
        int64_t some = n - a < SPAN ? n - a : SPAN;
        spread(x + a, some, most, temperature, e);
        vf one = {0}, two = {0};
        for (int64_t i = 0; i < some; i += W) {
            vf v = load(e + i), far = {0};
            if (some - i >= W) far = load(x + a + i) - most;
            else for (int64_t j = 0; j < some - i; j++) far[j] = x[a + i + j] - most;
            one += v;
            two += either(v > 0.0f, v * far, (vf){0});
        }
        sum += total(one), weighted += total(two);
    }
    if (product) *product = weighted;
    return sum;
}

typedef double vd __attribute__((vector_size(W * sizeof(double))));

/* The sum of a span, whole vectors, in double. */
ALWAYS double exactly(const float *e, int64_t some) {
    vd sum = {0};
    double all = 0;
    for (int64_t i = 0; i < some; i += W) sum += __builtin_convertvector(load(e + i), vd);
    for (int i = 0; i < W; i++) all += sum[i];
    return all;
}

/* The first token whose running sum of exponentials passes `target`, never one of probability 0; without one -1, and `sum` says what they come to. */
static int64_t passing(const float *x, int64_t n, float most, float temperature, double target, double *sum) {
    float e[SPAN];
    *sum = 0;
    for (int64_t a = 0; a < n; a += SPAN) {
        int64_t some = n - a < SPAN ? n - a : SPAN;
        spread(x + a, some, most, temperature, e);
        double behind = *sum + exactly(e, some);
        if (behind < target * (1 - 1e-12)) {
            *sum = behind; /* a span that ends well before the token: in vectors */
            continue;
        }
        for (int64_t i = 0; i < some; i++)
            if (e[i] > 0 && (*sum += e[i]) > target) return a + i;
    }
    return -1;
}

/* The token drawn with `uniform`; where rounding let the sum of all fall short of `total`, by that sum. */
static int64_t inverse_cdf(const float *x, int64_t n, float most, float temperature, double uniform, double total) {
    double sum;
    int64_t token = passing(x, n, most, temperature, uniform * total, &sum);
    return token < 0 ? passing(x, n, most, temperature, fmin(uniform * sum, nextafter(sum, 0)), &sum) : token;
}

/* entropy [n] of logits [n, ld] in nats; NaN where a logit is NaN. */
void ramulus_entropy(const float *logits, int64_t ld, int64_t n, int64_t vocabulary, int64_t threads, float *entropy) {
#pragma omp parallel for num_threads(threads < n ? threads : n) if (n * vocabulary > 65536)
    for (int64_t r = 0; r < n; r++) {
        double weighted, sum;
        const float *x = logits + r * ld;
        float most = peak(x, vocabulary);
        sum = mass(x, vocabulary, most, 1.0f, &weighted);
        entropy[r] = (float)(log(sum) - weighted / sum);
    }
}

/* One token a row by inverse CDF with uniform [n] in [0, 1): token, log-prob and, where `entropy` is not known yet, that too.
 * temperatures [n]; 0 takes the most probable token. */
void ramulus_draw(const float *logits, int64_t ld, int64_t n, int64_t vocabulary, int64_t threads, const float *temperatures, const double *uniform,
                 int64_t known, int64_t *token, float *logprob, float *entropy) {
#pragma omp parallel for num_threads(threads < n ? threads : n) if (n * vocabulary > 65536)
    for (int64_t r = 0; r < n; r++) {
        const float *x = logits + r * ld;
        double weighted = 0, sum = 0;
        float most = peak(x, vocabulary), temperature = temperatures[r];
        if (!known || temperature == 1.0f) sum = mass(x, vocabulary, most, 1.0f, &weighted);
        if (!known) entropy[r] = (float)(log(sum) - weighted / sum);
        if (temperature != 1.0f && temperature != 0.0f) sum = mass(x, vocabulary, most, temperature, NULL);
        if (temperature == 0.0f || sum != sum) { /* a NaN, which the caller looks into */
            token[r] = first(x, vocabulary, most), logprob[r] = 0.0f;
            continue;
        }
        token[r] = inverse_cdf(x, vocabulary, most, temperature, uniform[r], sum);
        logprob[r] = (float)((double)((x[token[r]] - most) / temperature) - log(sum));
    }
}
