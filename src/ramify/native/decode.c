/* One forward pass of a Llama-like model over the engine's KV, and one draw, for a CPU and in float32.
 *
 * A pass of few rows is many small products: called one by one they cost more than their arithmetic. Here a thread takes its share of the
 * tokens through all layers by itself, so that decoding waits for nobody. What a token's numbers are does not depend on how many others
 * run beside it, on the number of threads, or on whether it is prefilled or decoded: every sum runs in the order of its own terms.
 *
 * engine/compiled.py calls it.
 */
#include "vectors.h"

#define CHUNK 64 /* tokens whose activations are kept at once */
#define SPAN 512 /* tokens of the vocabulary that are summed at once */

/* What `shape` holds, in this order; see engine/compiled.py. */
typedef struct { int64_t layers, hidden, heads, kv_heads, dim, inner, vocabulary, threads; } Shape;
/* Panels [columns / P][inputs][P] and biases [columns] or NULL. */
typedef struct { const float *weight, *bias; } Matrix;
typedef struct { Matrix qkv, out, gate, up, down; const float *query_norm, *key_norm; } Layer;
typedef struct { const float *embedding, *cosine, *sine; Matrix head; Layer layer[]; } Model;
/* store [layers][keys, values][rows][kv_heads][capacity][dim] */
typedef struct { float *store; int64_t rows, capacity; } Slots;
/* answer [n]: the row of `logits` that a token's go to, or -1; `together`: tokens of one slot may see others of this pass. */
typedef struct { const int64_t *token, *position, *slot, *answer; int64_t n, together; float *logits, *room; float epsilon, scale; } Pass;

/* Of queries, keys and values beside each other, and of what attention answers, in one buffer. */
ALWAYS int64_t wide(const Shape *s) { return stride((s->heads + 2 * s->kv_heads) * s->dim); }

ALWAYS void begin(int n, const float *bias, float *out, int64_t ldo) {
    for (int r = 0; r < n; r++)
        for (int i = 0; i < P; i += W) store(out + r * ldo + i, bias ? load(bias + i) : (vf){0});
}

/* out[n, columns] = x[n, k] w + bias, or out += that. */
static void product(int n, const float *x, int64_t ldx, Matrix m, int64_t k, int64_t columns, float *out, int64_t ldo, int add) {
    for (int64_t c = 0; c < columns; c += P) {
        const float *bias = m.bias ? m.bias + c : NULL;
        if (!add) begin(n, bias, out + c, ldo);
        else if (bias)
            for (int r = 0; r < n; r++)
                for (int i = 0; i < P; i += W) store(out + r * ldo + c + i, load(out + r * ldo + c + i) + load(bias + i));
        panel(n, x, ldx, m.weight + c * k, k, out + c, ldo, 1);
    }
}

/* y[n, d] = RMSNorm of x without its weight, which is folded into the matrix that follows. */
static void unit(int n, const float *x, int64_t ldx, int64_t d, float epsilon, float *y, int64_t ldy) {
    for (int r = 0; r < n; r++) {
        vf sum = {0};
        for (int64_t i = 0; i < d; i += W) sum += load(x + r * ldx + i) * load(x + r * ldx + i); /* zeros beyond d */
        float factor = 1.0f / sqrtf(total(sum) / (float)d + epsilon);
        for (int64_t i = 0; i < d; i += W) store(y + r * ldy + i, load(x + r * ldx + i) * factor);
    }
}

/* act[n, inner] = silu(x gate) * (x up) */
static void gated(int n, const float *x, int64_t ldx, const Layer *layer, int64_t k, int64_t inner, float *act, int64_t lda) {
    float gate[CHUNK * P], up[CHUNK * P];
    for (int64_t c = 0; c < inner; c += P) {
        begin(n, layer->gate.bias ? layer->gate.bias + c : NULL, gate, P);
        begin(n, layer->up.bias ? layer->up.bias + c : NULL, up, P);
        panel(n, x, ldx, layer->gate.weight + c * k, k, gate, P, 1);
        panel(n, x, ldx, layer->up.weight + c * k, k, up, P, 1);
        for (int r = 0; r < n; r++)
            for (int i = 0; i < P; i += W) {
                vf g = load(gate + r * P + i);
                store(act + r * lda + c + i, g / (1.0f + exponential(-g)) * load(up + r * P + i));
            }
    }
}

/* One head of one token: normed where the model does that, and rotated. */
static void turn(float *x, int64_t dim, const float *norm, float epsilon, const float *cosine, const float *sine) {
    int64_t half = dim / 2;
    if (norm) {
        unit(1, x, dim, dim, epsilon, x, dim);
        for (int64_t i = 0; i < dim; i += W) store(x + i, load(x + i) * load(norm + i));
    }
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
/* Neighbours in pairs of 1, 2, ... lanes: those of a beside those of b, added up. */
#if W == 16
#define ADD1(a, b) (PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) + PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#define ADD2(a, b) (PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) + PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define ADD4(a, b) (PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) + PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#define ADD8(a, b) (PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif W == 8
#define ADD1(a, b) (PICK(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
#define ADD2(a, b) (PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define ADD4(a, b) (PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#else
#define ADD1(a, b) (PICK(a, b, 0, 4, 2, 6) + PICK(a, b, 1, 5, 3, 7))
#define ADD2(a, b) (PICK(a, b, 0, 1, 4, 5) + PICK(a, b, 2, 3, 6, 7))
#endif

/* Lane i: the sum of v[i]. */
ALWAYS vf across(const vf *v) {
    vf one[W / 2], two[W / 4];
    for (int i = 0; i < W / 2; i++) one[i] = ADD1(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < W / 4; i++) two[i] = ADD2(one[2 * i], one[2 * i + 1]);
#if W == 4
    return two[0];
#elif W == 8
    return ADD4(two[0], two[1]);
#else
    vf low = ADD4(two[0], two[1]), high = ADD4(two[2], two[3]);
    return ADD8(low, high);
#endif
}

/* score[0..count) = scale q k_j; keys beyond count are read and their scores -inf. */
static void scores(const float *q, const float *keys, int64_t dim, int64_t count, float scale, float *score) {
    for (int64_t j = 0; j < count; j += W) {
        vf sum[W];
        for (int i = 0; i < W; i++) sum[i] = (vf){0};
        int64_t some = count - j < W ? count - j : W;
        if (some == W)
            for (int64_t d = 0; d < dim; d += W) {
                vf a = load(q + d);
                for (int i = 0; i < W; i++) sum[i] += a * load(keys + (j + i) * dim + d);
            }
        else
            for (int i = 0; i < some; i++)
                for (int64_t d = 0; d < dim; d += W) sum[i] += load(q + d) * load(keys + (j + i) * dim + d);
        store(score + j, across(sum) * scale);
        for (int64_t i = some; i < W; i++) score[j + i] = -INFINITY;
    }
}

/* Scores to exponentials; returns one over their sum. */
static float soften(float *score, int64_t count) {
    vf top = load(score);
    for (int64_t j = W; j < count; j += W) {
        vf x = load(score + j);
        top = select(x > top, x, top);
    }
    float most = highest(top);
    vf sum = {0};
    for (int64_t j = 0; j < count; j += W) {
        vf e = exponential(load(score + j) - most);
        store(score + j, e);
        sum += e;
    }
    return 1.0f / total(sum);
}

/* out = factor * sum over j of weight[j] value_j, for `some` (1 or 2) heads and 2 W numbers of each. */
ALWAYS void gather(const int some, const int vectors, const float *weight, int64_t ldw, const float *value, int64_t dim, int64_t count,
                   const float *factor, float *out) {
    vf sum[2][4];
    for (int h = 0; h < some; h++)
        for (int v = 0; v < vectors; v++) sum[h][v] = (vf){0};
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++) {
            vf x = load(value + j * dim + v * W);
            for (int h = 0; h < some; h++) sum[h][v] += weight[h * ldw + j] * x;
        }
    for (int h = 0; h < some; h++)
        for (int v = 0; v < vectors; v++) store(out + h * dim + v * W, sum[h][v] * factor[h]);
}

/* One token's query heads of one key head over the first `count` positions of its slot: q [shared, dim] -> out [shared, dim]. */
static void attend(const float *q, const float *keys, const float *values, int64_t shared, int64_t dim, int64_t count, float scale, float *score,
                   float *out) {
    int64_t line = (count + W - 1) / W * W;
    for (int64_t h = 0; h < shared; h += 2) {
        int some = shared - h < 2 ? 1 : 2;
        float factor[2];
        for (int i = 0; i < some; i++) {
            scores(q + (h + i) * dim, keys, dim, count, scale, score + i * line);
            factor[i] = soften(score + i * line, count);
        }
        for (int64_t d = 0; d < dim;) {
            int four = dim - d >= 4 * W;
            const float *value = values + d;
            float *to = out + h * dim + d;
            if (some == 2 && four) gather(2, 4, score, line, value, dim, count, factor, to);
            else if (some == 2) gather(2, 1, score, line, value, dim, count, factor, to);
            else if (four) gather(1, 4, score, line, value, dim, count, factor, to);
            else gather(1, 1, score, line, value, dim, count, factor, to);
            d += four ? 4 * W : W;
        }
    }
}

/* Queries, keys and values of tokens [first, first + n) of a layer: queries to `queries` [pass, heads x dim], the rest into the store. */
static void project(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, const float *x,
                    float *queries, float *y, float *mixed) {
    const Layer *layer = &m->layer[l];
    int64_t d = stride(s->hidden), all = wide(s), dim = s->dim, line = slots->capacity * dim, half = dim / 2;
    unit(n, x + first * d, d, s->hidden, p->epsilon, y, d);
    product(n, y, d, layer->qkv, s->hidden, all - P, mixed, all, 0);
    for (int r = 0; r < n; r++) {
        int64_t t = first + r, at = p->position[t];
        float *row = mixed + r * all;
        for (int64_t h = 0; h < s->heads + s->kv_heads; h++)
            turn(row + h * dim, dim, h < s->heads ? layer->query_norm : layer->key_norm, p->epsilon, m->cosine + at * half, m->sine + at * half);
        memcpy(queries + t * s->heads * dim, row, s->heads * dim * sizeof(float));
        for (int64_t h = 0; h < 2 * s->kv_heads; h++) {
            int64_t part = h / s->kv_heads, head = h % s->kv_heads;
            float *to = slots->store + (((2 * l + part) * slots->rows + p->slot[t]) * s->kv_heads + head) * line + at * dim;
            memcpy(to, row + (s->heads + h) * dim, dim * sizeof(float));
        }
    }
}

/* Attention and MLP of tokens [first, first + n) of a layer, added to x. */
static void advance(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, float *x,
                    const float *queries, float *y, float *mixed, float *act, float *score) {
    const Layer *layer = &m->layer[l];
    int64_t d = stride(s->hidden), dim = s->dim, line = slots->capacity * dim, shared = s->heads / s->kv_heads, joined = s->heads * dim;
    int64_t all = wide(s), inner = stride(s->inner);
    for (int r = 0; r < n; r++) {
        int64_t t = first + r;
        for (int64_t h = 0; h < s->kv_heads; h++) {
            const float *keys = slots->store + ((2 * l * slots->rows + p->slot[t]) * s->kv_heads + h) * line;
            const float *values = keys + slots->rows * s->kv_heads * line;
            attend(queries + t * joined + h * shared * dim, keys, values, shared, dim, p->position[t] + 1, p->scale, score,
                   mixed + r * all + h * shared * dim);
        }
    }
    product(n, mixed, all, layer->out, joined, d - P, x + first * d, d, 1);
    unit(n, x + first * d, d, s->hidden, p->epsilon, y, d);
    gated(n, y, d, layer, s->hidden, inner - P, act, inner);
    product(n, act, inner, layer->down, s->inner, d - P, x + first * d, d, 1);
}

/* Logits of those of the tokens [first, first + n) that want them. */
static void finish(const Model *m, const Shape *s, const Pass *p, int64_t first, int n, const float *x, float *y) {
    int64_t d = stride(s->hidden), columns = stride(s->vocabulary), to = -1;
    int some = 0;
    for (int r = 0; r < n; r++) {
        if (p->answer[first + r] < 0) continue;
        if (to < 0) to = p->answer[first + r];
        unit(1, x + (first + r) * d, d, s->hidden, p->epsilon, y + some++ * d, d);
    }
    if (some) product(some, y, d, m->head, s->hidden, columns - P, p->logits + to * columns, columns, 0);
}

/* Floats that one thread needs beside x and the queries. */
static int64_t own(const Shape *s, int64_t capacity) {
    return CHUNK * (stride(s->hidden) + wide(s) + stride(s->inner)) + 2 * padded(capacity);
}

int64_t ramify_lanes(void) { return W; }

int64_t ramify_room(const Shape *s, int64_t n, int64_t capacity) {
    return n * (stride(s->hidden) + s->heads * s->dim) + s->threads * own(s, capacity);
}

/* One thread's share, the tokens [first, last). */
static void work(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t first, int64_t last, float *x, float *queries, float *mine) {
    int64_t d = stride(s->hidden);
    float *y = mine, *mixed = y + CHUNK * d, *act = mixed + CHUNK * wide(s), *score = act + CHUNK * stride(s->inner);
    for (int64_t t = first; t < last; t++) {
        memcpy(x + t * d, m->embedding + p->token[t] * s->hidden, s->hidden * sizeof(float));
        memset(x + t * d + s->hidden, 0, (d - s->hidden) * sizeof(float));
    }
#define EACH for (int64_t a = first, n; n = last - a < CHUNK ? last - a : CHUNK, a < last; a += n)
    if (p->together) {
        for (int64_t l = 0; l < s->layers; l++) {
            EACH project(m, s, slots, p, l, a, (int)n, x, queries, y, mixed);
#pragma omp barrier
            EACH advance(m, s, slots, p, l, a, (int)n, x, queries, y, mixed, act, score);
        }
        EACH finish(m, s, p, a, (int)n, x, y);
        return;
    }
    EACH {
        for (int64_t l = 0; l < s->layers; l++) {
            project(m, s, slots, p, l, a, (int)n, x, queries, y, mixed);
            advance(m, s, slots, p, l, a, (int)n, x, queries, y, mixed, act, score);
        }
        finish(m, s, p, a, (int)n, x, y);
    }
}

void ramify_forward(const Model *m, const Shape *s, const Slots *slots, const Pass *p) {
    float *x = p->room, *queries = x + p->n * stride(s->hidden), *rest = queries + p->n * s->heads * s->dim;
    int64_t threads = s->threads < p->n ? s->threads : p->n;
#pragma omp parallel num_threads(threads)
    {
        int64_t mine = 0, count = 1;
#ifdef _OPENMP
        mine = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        work(m, s, slots, p, p->n * mine / count, p->n * (mine + 1) / count, x, queries, rest + mine * own(s, slots->capacity));
    }
}

/* exp((x - most) / heat) of some logits, -inf and what lies beyond `some` giving 0. */
ALWAYS void spread(const float *x, int64_t some, float most, float cool, float *e) {
    for (int64_t i = 0; i < some; i += W) {
        vf v = splat(-INFINITY);
        if (some - i >= W) v = load(x + i);
        else for (int64_t j = 0; j < some - i; j++) v[j] = x[i + j];
        store(e + i, exponential((v - most) * cool));
    }
}

static float peak(const float *x, int64_t n, int64_t *where) {
    float most = x[0];
    for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    for (*where = 0; *where + 1 < n && x[*where] != most;) ++*where;
    return most;
}

/* The sum of exponentials, and in `product` that of each times its distance from the largest logit. */
static double mass(const float *x, int64_t n, float most, float cool, double *product) {
    float e[SPAN];
    double sum = 0, weighted = 0;
    for (int64_t a = 0; a < n; a += SPAN) {
        int64_t some = n - a < SPAN ? n - a : SPAN;
        spread(x + a, some, most, cool, e);
        vf one = {0}, two = {0};
        for (int64_t i = 0; i < some; i += W) {
            vf v = load(e + i), far = {0};
            if (some - i >= W) far = load(x + a + i) - most;
            else for (int64_t j = 0; j < some - i; j++) far[j] = x[a + i + j] - most;
            one += v;
            two += select(v > 0.0f, v * far, (vf){0});
        }
        sum += total(one), weighted += total(two);
    }
    if (product) *product = weighted;
    return sum;
}

/* The first token whose running sum of exponentials passes `target`; never one of probability 0. */
static int64_t found(const float *x, int64_t n, float most, float cool, double target) {
    float e[SPAN];
    int64_t last = 0;
    double sum = 0;
    for (int64_t a = 0; a < n; a += SPAN) {
        int64_t some = n - a < SPAN ? n - a : SPAN;
        spread(x + a, some, most, cool, e);
        for (int64_t i = 0; i < some; i++) {
            if (!(e[i] > 0)) continue;
            last = a + i, sum += e[i];
            if (sum > target) return last;
        }
    }
    return last;
}

/* entropy [n] of logits [n, ld] in nats; NaN where a logit is NaN. */
void ramify_entropy(const float *logits, int64_t ld, int64_t n, int64_t vocabulary, int64_t threads, float *entropy) {
#pragma omp parallel for num_threads(threads < n ? threads : n) if (n * vocabulary > 65536)
    for (int64_t r = 0; r < n; r++) {
        int64_t best;
        double weighted, sum;
        const float *x = logits + r * ld;
        float most = peak(x, vocabulary, &best);
        sum = mass(x, vocabulary, most, 1.0f, &weighted);
        entropy[r] = (float)(log(sum) - weighted / sum);
    }
}

/* One token a row by inverse CDF with uniform [n] in [0, 1): token, log-prob and, where `entropy` is not known yet, that too.
 * temperature [n]; 0 takes the most probable token. */
void ramify_draw(const float *logits, int64_t ld, int64_t n, int64_t vocabulary, int64_t threads, const float *temperature, const double *uniform,
                 int64_t known, int64_t *token, float *logprob, float *entropy) {
#pragma omp parallel for num_threads(threads < n ? threads : n) if (n * vocabulary > 65536)
    for (int64_t r = 0; r < n; r++) {
        const float *x = logits + r * ld;
        int64_t best;
        double weighted = 0, sum = 0;
        float most = peak(x, vocabulary, &best), heat = temperature[r], cool = 1.0f / heat;
        if (!known || heat == 1.0f) sum = mass(x, vocabulary, most, 1.0f, &weighted);
        if (!known) entropy[r] = (float)(log(sum) - weighted / sum);
        token[r] = best, logprob[r] = 0.0f;
        if (heat == 0.0f) continue;
        if (heat != 1.0f) sum = mass(x, vocabulary, most, cool, NULL);
        token[r] = found(x, vocabulary, most, cool, uniform[r] * sum);
        logprob[r] = (float)((double)((x[token[r]] - most) * cool) - log(sum));
    }
}
