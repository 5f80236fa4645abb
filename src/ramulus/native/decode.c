/* One forward pass of a Llama-like model over the engine's KV, for a CPU: in float32, or with -DBFLOAT in bfloat16, where weights, keys, values and
 * the inputs of products are bfloat16, and sums, norms, rotation, softmax, the residual stream and logits float32.
 *
 * A pass of few rows is many small products: called one by one they cost more than their arithmetic. Here a thread takes its share of the
 * tokens through all layers by itself, so that decoding waits for nobody; of very few tokens threads share out the matrices instead. What a token's numbers are does not depend on how many others
 * run beside it, on the number of threads, or on whether it is prefilled or decoded: every sum runs in the order of its own terms.
 *
 * engine/local/compiled.py calls it.
 */
#include "cells.h"

#ifdef MATRIX /* its processors have 2 MB of second cache a core */
#define CHUNK 256 /* tokens whose activations are kept at once */
#else
#define CHUNK 128
#endif
#ifndef FEW
#define FEW 12 /* tokens a thread up to which threads share out the matrices instead */
#endif

/* What `shape` holds, in this order; see engine/local/compiled.py. `plain`: the embedding is made of floats, whatever a cell is. */
typedef struct { int64_t layers, hidden, heads, kv_heads, dim, inner, vocabulary, plain, threads; } Shape;
/* Panels [columns / P][inputs / PAIR][P][PAIR] and biases [columns] or NULL. */
typedef struct { const cell *weight; const float *bias; } Matrix;
/* The norms of heads, and those before attention and before the MLP: [whole vectors], or NULL where the matrix behind has it in it, or none is.
 * A token attends to the last `window` positions, its own the last of them; 0 is all. */
typedef struct { Matrix qkv, out, gate, up, down; const float *query_norm, *key_norm, *before, *after; int64_t window; } Layer;
typedef struct { const void *embedding; const float *cosine, *sine, *norm; Matrix head; Layer layer[]; } Model;
/* store [layers][keys, values][rows][kv_heads][capacity][dim] */
typedef struct { cell *store; int64_t rows, capacity; } Slots;
/* answer [n]: the row of `logits` that a token's go to, or -1; `together`: tokens of one slot may see others of this pass. */
typedef struct { const int64_t *token, *position, *slot, *answer; int64_t n, together; float *logits, *room; float epsilon, scale; } Pass;

/* Of queries, keys and values beside each other, and of what attention answers, in one buffer. */
ALWAYS int64_t wide(const Shape *s) { return stride((s->heads + 2 * s->kv_heads) * s->dim); }
/* The same in cells. */
ALWAYS int64_t broad(const Shape *s) { return wide(s) * (int64_t)(sizeof(float) / sizeof(cell)); }

/* Begin sums with a bias. */
ALWAYS void begin(int n, const float *bias, float *out, int64_t ldo, const int add) {
    for (int r = 0; r < n; r++)
        for (int i = 0; i < P; i += W) store(out + r * ldo + i, add ? load(out + r * ldo + i) + load(bias + i) : load(bias + i));
}

/* Inputs of a panel. */
ALWAYS int64_t even(int64_t k) { return (k + PAIR - 1) / PAIR * PAIR; }

/* Columns [from, to) of a matrix, whole panels. */
typedef struct { int64_t from, to; } Span;

/* One panel of columns, from c on, to where out begins: out[n, P] = x[n, k] w + bias, or out += that. */
static void one_panel(int n, const cell *x, int64_t ldx, Matrix m, int64_t c, int64_t k, float *out, int64_t ldo, int add) {
    if (m.bias) begin(n, m.bias + c, out, ldo, add);
    gain(n, x, ldx, m.weight + c * even(k), k, out, ldo, add || m.bias);
}

/* Those columns of out[n, ldo] = x[n, k] w + bias, or out += that. */
static void product(int n, const cell *x, int64_t ldx, Matrix m, int64_t k, Span span, float *out, int64_t ldo, int add) {
    for (int64_t c = span.from; c < span.to; c += P) one_panel(n, x, ldx, m, c, k, out + c, ldo, add);
}

/* What a row's RMSNorm multiplies it by, besides its weight. */
ALWAYS float shrink(const float *x, int64_t d, float epsilon) {
    vf sum = {0};
    for (int64_t i = 0; i < d; i += W) sum += load(x + i) * load(x + i); /* zeros beyond d */
    return 1.0f / sqrtf(total(sum) / (float)d + epsilon);
}

/* y[n, d] = RMSNorm of x; without its weight where that is NULL. */
static void unit(int n, const float *x, int64_t ldx, int64_t d, float epsilon, const float *weight, cell *y, int64_t ldy) {
    for (int r = 0; r < n; r++) {
        float factor = shrink(x + r * ldx, d, epsilon);
        for (int64_t i = 0; i < d; i += W) {
            vf v = load(x + r * ldx + i) * factor;
            narrow(y + r * ldy + i, weight ? v * load(weight + i) : v);
        }
    }
}

/* Those columns of act[n, lda] = silu(x gate) * (x up). */
static void gated(int n, const cell *x, int64_t ldx, const Layer *layer, int64_t k, Span span, cell *act, int64_t lda) {
    float gate[CHUNK * P], up[CHUNK * P];
    for (int64_t c = span.from; c < span.to; c += P) {
        one_panel(n, x, ldx, layer->gate, c, k, gate, P, 0);
        one_panel(n, x, ldx, layer->up, c, k, up, P, 0);
        for (int r = 0; r < n; r++)
            for (int i = 0; i < P; i += W) {
                vf g = load(gate + r * P + i);
                narrow(act + r * lda + c + i, g / (1.0f + exponential(-g)) * load(up + r * P + i));
            }
    }
}

/* One head of one token: normed where the model does that, and rotated. */
static void turn(float *x, int64_t dim, const float *norm, float epsilon, const float *cosine, const float *sine) {
    int64_t half = dim / 2;
    if (norm) {
        float factor = shrink(x, dim, epsilon);
        for (int64_t i = 0; i < dim; i += W) store(x + i, load(x + i) * factor * load(norm + i));
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

/* Partial sums of q k, in the order of `scores`. */
ALWAYS vf inner(const cell *q, const cell *key, int64_t dim) {
    vf sum = {0};
    int64_t d = 0;
#ifdef DOTS
    for (; dim - d >= PAIR * W; d += PAIR * W) sum = dots(sum, *(const wordsu *)(q + d), *(const wordsu *)(key + d));
#endif
    for (; d < dim; d += W) sum += widen(q + d) * widen(key + d);
    return sum;
}

/* Ask memory for n cells. */
ALWAYS void expect(const cell *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(cell)) __builtin_prefetch(x + i);
}

/* score[0..count) = scale q k_j, and -inf up to a whole vector; asks for as many `values` meanwhile. */
static void scores(const cell *q, const cell *keys, const cell *values, int64_t dim, int64_t count, float scale, float *score) {
    for (int64_t j = 0; j < count; j += W) {
        if (values) expect(values + j * dim, (count - j < W ? count - j : W) * dim);
        vf sum[W];
        for (int i = 0; i < W; i++) sum[i] = (vf){0};
        int64_t some = count - j < W ? count - j : W, d = 0;
        if (some == W) {
#ifdef DOTS
            for (; dim - d >= PAIR * W; d += PAIR * W) {
                words a = *(const wordsu *)(q + d);
                for (int i = 0; i < W; i++) sum[i] = dots(sum[i], a, *(const wordsu *)(keys + (j + i) * dim + d));
            }
#endif
            for (; d < dim; d += W) {
                vf a = widen(q + d);
                for (int i = 0; i < W; i++) sum[i] += a * widen(keys + (j + i) * dim + d);
            }
        } else
            for (int i = 0; i < some; i++) sum[i] = inner(q, keys + (j + i) * dim, dim);
        store(score + j, across(sum) * scale);
        for (int64_t i = some; i < W; i++) score[j + i] = -INFINITY;
    }
}

/* Scores to exponentials; returns one over their sum. */
static float soften(float *score, int64_t count) {
    vf top = load(score);
    for (int64_t j = W; j < count; j += W) {
        vf x = load(score + j);
        top = either(x > top, x, top);
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

#define BESIDE (W == 16 ? 4 : 2) /* heads that meet a value at once: their sums stay in registers */

/* out = factor * sum over j of weight[j] value_j, for `some` heads, at most BESIDE, and `vectors` W numbers of each; asks for what lies at `next`
 * meanwhile. */
ALWAYS void gather(const int some, const int vectors, const float *weight, int64_t ldw, const cell *value, const cell *next, int64_t dim,
                   int64_t count, const float *factor, cell *out) {
    vf sum[BESIDE][4];
    for (int h = 0; h < some; h++)
        for (int v = 0; v < vectors; v++) sum[h][v] = (vf){0};
    for (int64_t j = 0; j < count; j++) {
        expect(next + j * dim, vectors * W);
        for (int v = 0; v < vectors; v++) {
            vf x = widen(value + j * dim + v * W);
            for (int h = 0; h < some; h++) sum[h][v] += weight[h * ldw + j] * x;
        }
    }
    for (int h = 0; h < some; h++)
        for (int v = 0; v < vectors; v++) narrow(out + h * dim + v * W, sum[h][v] * factor[h]);
}

#define GATHER(N, ...) case N: if (four) gather(N, 4, __VA_ARGS__); else gather(N, 1, __VA_ARGS__); break;

/* One token's query heads of one key head over `count` positions of its slot: q [shared, dim] -> out [shared, dim]. `next`: keys that are met next. */
static void attend(const cell *q, const cell *keys, const cell *values, const cell *next, int64_t shared, int64_t dim, int64_t count, float scale,
                   float *score, cell *out) {
    int64_t line = (count + W - 1) / W * W;
    for (int64_t h = 0; h < shared; h += BESIDE) {
        int some = shared - h < BESIDE ? (int)(shared - h) : BESIDE;
        float factor[BESIDE];
        for (int i = 0; i < some; i++) {
            scores(q + (h + i) * dim, keys, h || i ? NULL : values, dim, count, scale, score + i * line);
            factor[i] = soften(score + i * line, count);
        }
        for (int64_t d = 0; d < dim;) {
            int four = dim - d >= 4 * W;
            const cell *value = values + d, *ahead = h + BESIDE < shared ? value : next + d;
            cell *to = out + h * dim + d;
            switch (some) {
                GATHER(1, score, line, value, ahead, dim, count, factor, to)
                GATHER(2, score, line, value, ahead, dim, count, factor, to)
#if W == 16
                GATHER(3, score, line, value, ahead, dim, count, factor, to)
                GATHER(4, score, line, value, ahead, dim, count, factor, to)
#endif
            }
            d += four ? 4 * W : W;
        }
    }
}

/* y[0..n) = x, whole vectors. */
ALWAYS void take(cell *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) narrow(y + i, load(x + i));
}

/* Rotate the projections `mixed` [n, all] of tokens [first, first + n): queries to `queries` [pass, heads x dim], the rest into the store. */
static void place(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, cell *queries, float *mixed) {
    const Layer *layer = &m->layer[l];
    int64_t all = wide(s), dim = s->dim, line = slots->capacity * dim, half = dim / 2;
    for (int r = 0; r < n; r++) {
        int64_t t = first + r, at = p->position[t];
        float *row = mixed + r * all;
        for (int64_t h = 0; h < s->heads + s->kv_heads; h++)
            turn(row + h * dim, dim, h < s->heads ? layer->query_norm : layer->key_norm, p->epsilon, m->cosine + at * half, m->sine + at * half);
        take(queries + t * s->heads * dim, row, s->heads * dim);
        for (int64_t h = 0; h < 2 * s->kv_heads; h++) {
            int64_t part = h / s->kv_heads, head = h % s->kv_heads;
            cell *to = slots->store + (((2 * l + part) * slots->rows + p->slot[t]) * s->kv_heads + head) * line + at * dim;
            take(to, row + (s->heads + h) * dim, dim);
        }
    }
}

/* What the tokens [first, first + n) attend to, to `heard` [n, broad]. */
static void look(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, const cell *queries, cell *heard,
                 float *score) {
    int64_t window = m->layer[l].window, dim = s->dim, line = slots->capacity * dim, shared = s->heads / s->kv_heads, joined = s->heads * dim, all = broad(s);
    for (int r = 0; r < n; r++) {
        int64_t t = first + r, count = p->position[t] + 1, from = window && count > window ? count - window : 0;
        for (int64_t h = 0; h < s->kv_heads; h++) {
            const cell *keys = slots->store + ((2 * l * slots->rows + p->slot[t]) * s->kv_heads + h) * line + from * dim;
            const cell *values = keys + slots->rows * s->kv_heads * line;
            const cell *next = h + 1 < s->kv_heads || r + 1 == n ? keys + line : keys + ((p->slot[t + 1] - p->slot[t]) * s->kv_heads - h) * line;
            attend(queries + t * joined + h * shared * dim, keys, values, next, shared, dim, count - from, p->scale, score,
                   heard + r * all + h * shared * dim);
        }
    }
}

/* Those columns of the logits of the tokens [first, first + n) that want some. */
static void finish(const Model *m, const Shape *s, const Pass *p, int64_t first, int n, const float *x, cell *y, Span span) {
    int64_t d = stride(s->hidden), columns = stride(s->vocabulary), to = -1;
    int some = 0;
    for (int r = 0; r < n; r++) {
        if (p->answer[first + r] < 0) continue;
        if (to < 0) to = p->answer[first + r];
        unit(1, x + (first + r) * d, d, s->hidden, p->epsilon, m->norm, y + some++ * d, d);
    }
    if (some) product(some, y, d, m->head, s->hidden, span, p->logits + to * columns, columns, 0);
}

/* Floats that one thread needs beside x and the queries. */
static int64_t own(const Shape *s, int64_t capacity) {
    return CHUNK * (stride(s->hidden) + wide(s) + stride(s->inner)) + BESIDE * padded(capacity);
}

int64_t ramulus_lanes(void) { return W; }

int64_t ramulus_room(const Shape *s, int64_t n, int64_t capacity) {
    return n * (stride(s->hidden) + s->heads * s->dim) + s->threads * own(s, capacity);
}

/* One thread's memory: of the tokens at hand a normed copy, projections or, in the same place, answers of attention, activations; and scores. */
typedef struct { cell *y, *heard, *act; float *mixed, *score; } Own;

static Own own_of(const Shape *s, float *room) {
    float *mixed = room + CHUNK * stride(s->hidden), *act = mixed + CHUNK * wide(s);
    return (Own){(cell *)room, (cell *)mixed, (cell *)act, mixed, act + CHUNK * stride(s->inner)};
}

ALWAYS Span whole(int64_t columns) { return (Span){0, padded(columns)}; }

/* A thread's share of the panels. */
ALWAYS Span part(int64_t columns, int64_t mine, int64_t count) {
    int64_t panels = padded(columns) / P;
    return (Span){panels * mine / count * P, panels * (mine + 1) / count * P};
}

static void embed(const Model *m, const Shape *s, const Pass *p, int64_t first, int64_t last, float *x) {
    int64_t d = stride(s->hidden);
    for (int64_t t = first; t < last; t++) {
        int64_t from = p->token[t] * s->hidden;
        if (s->plain) memcpy(x + t * d, (const float *)m->embedding + from, s->hidden * sizeof(float));
        else for (int64_t i = 0; i < s->hidden; i++) x[t * d + i] = single((const cell *)m->embedding + from + i);
        memset(x + t * d + s->hidden, 0, (d - s->hidden) * sizeof(float));
    }
}

/* Tokens [first, first + n) to their queries, keys and values in a layer. */
static void project(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, const float *x,
                    cell *queries, Own o) {
    int64_t d = stride(s->hidden), all = wide(s);
    unit(n, x + first * d, d, s->hidden, p->epsilon, m->layer[l].before, o.y, d);
    product(n, o.y, d, m->layer[l].qkv, s->hidden, (Span){0, all - P}, o.mixed, all, 0);
    place(m, s, slots, p, l, first, n, queries, o.mixed);
}

/* Attention and MLP of tokens [first, first + n) of a layer, added to x. */
static void advance(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t l, int64_t first, int n, float *x,
                    const cell *queries, Own o) {
    const Layer *layer = &m->layer[l];
    int64_t d = stride(s->hidden), inner = stride(s->inner);
    look(m, s, slots, p, l, first, n, queries, o.heard, o.score);
    product(n, o.heard, broad(s), layer->out, s->heads * s->dim, whole(s->hidden), x + first * d, d, 1);
    unit(n, x + first * d, d, s->hidden, p->epsilon, layer->after, o.y, d);
    gated(n, o.y, d, layer, s->hidden, whole(s->inner), o.act, inner);
    product(n, o.act, inner, layer->down, s->inner, whole(s->hidden), x + first * d, d, 1);
}

/* One thread's share of many tokens: those of [first, last) through all layers. */
static void many(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t first, int64_t last, float *x, cell *queries, Own o) {
    embed(m, s, p, first, last, x);
#define EACH for (int64_t a = first, n; n = last - a < CHUNK ? last - a : CHUNK, a < last; a += n)
    if (p->together) {
        for (int64_t l = 0; l < s->layers; l++) {
            EACH project(m, s, slots, p, l, a, (int)n, x, queries, o);
#pragma omp barrier
            EACH advance(m, s, slots, p, l, a, (int)n, x, queries, o);
        }
        EACH finish(m, s, p, a, (int)n, x, o.y, whole(s->vocabulary));
        return;
    }
    EACH {
        for (int64_t l = 0; l < s->layers; l++) {
            project(m, s, slots, p, l, a, (int)n, x, queries, o);
            advance(m, s, slots, p, l, a, (int)n, x, queries, o);
        }
        finish(m, s, p, a, (int)n, x, o.y, whole(s->vocabulary));
    }
}

/* One thread's share of few tokens: its part of every matrix, so that the weights are read once, and not by every thread. `all` is shared. */
static void few(const Model *m, const Shape *s, const Slots *slots, const Pass *p, int64_t mine, int64_t count, float *x, cell *queries, Own all, Own o) {
    int64_t d = stride(s->hidden), inner = stride(s->inner), first = p->n * mine / count, last = p->n * (mine + 1) / count;
    int n = (int)p->n;
    Span hidden = part(s->hidden, mine, count);
    embed(m, s, p, first, last, x);
#pragma omp barrier
    for (int64_t l = 0; l < s->layers; l++) {
        const Layer *layer = &m->layer[l];
        unit(n, x, d, s->hidden, p->epsilon, layer->before, o.y, d);
        product(n, o.y, d, layer->qkv, s->hidden, part(wide(s) - P, mine, count), all.mixed, wide(s), 0);
#pragma omp barrier
        place(m, s, slots, p, l, first, (int)(last - first), queries, all.mixed + first * wide(s));
        look(m, s, slots, p, l, first, (int)(last - first), queries, all.heard + first * broad(s), o.score);
#pragma omp barrier
        product(n, all.heard, broad(s), layer->out, s->heads * s->dim, hidden, x, d, 1);
#pragma omp barrier
        unit(n, x, d, s->hidden, p->epsilon, layer->after, o.y, d);
        gated(n, o.y, d, layer, s->hidden, part(s->inner, mine, count), all.act, inner);
#pragma omp barrier
        product(n, all.act, inner, layer->down, s->inner, hidden, x, d, 1);
#pragma omp barrier
    }
    finish(m, s, p, 0, n, x, o.y, part(s->vocabulary, mine, count));
}

void ramulus_forward(const Model *m, const Shape *s, const Slots *slots, const Pass *p) {
    float *x = p->room, *after = x + p->n * stride(s->hidden), *rest = after + p->n * s->heads * s->dim;
    cell *queries = (cell *)after;
    int64_t threads = s->threads < p->n ? s->threads : p->n, size = own(s, slots->capacity);
    if (!p->together && p->n <= FEW * s->threads && p->n <= CHUNK) threads = s->threads;
#pragma omp parallel num_threads(threads)
    {
        int64_t mine = 0, count = 1;
#ifdef _OPENMP
        mine = omp_get_thread_num(), count = omp_get_num_threads();
#endif
        Own o = own_of(s, rest + mine * size);
        if (count > 1 && !p->together && p->n <= FEW * count && p->n <= CHUNK) few(m, s, slots, p, mine, count, x, queries, own_of(s, rest), o);
        else many(m, s, slots, p, p->n * mine / count, p->n * (mine + 1) / count, x, queries, o);
    }
}

/* How rows draw: temperature [n]; streams and counts [n] of their random numbers; ends [vocabulary], 1 for tokens that may end a text, or NULL;
 * room for uniform, token, logprob and entropy [n]; the function that draws, of draw.c; and where it is written down, `wide` rows a step. */
typedef void (*Draw)(const float *, int64_t, int64_t, int64_t, int64_t, const float *, const double *, int64_t, int64_t *, float *, float *);
typedef struct {
    const float *temperature;
    const uint64_t *stream;
    uint64_t *count;
    const uint8_t *ends;
    double *uniform;
    Draw draw;
    int64_t *token;
    float *logprob, *entropy;
    int64_t *tokens;
    double *logprobs, *entropies;
    int64_t wide;
} Drawing;

/* The number `count` of a stream in [0, 1); engine/rng.py says what it is. */
static double uniform(uint64_t stream, uint64_t count) {
    uint64_t x = stream + (count + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

/* Up to `most` steps, each of one token a row, which is drawn from the logits and runs next; fewer where a row draws a token that may end a text,
 * or has logits that are not finite, whose entropy is NaN. Tokens, positions and counts go on. Returns how many. */
int64_t ramulus_steps(const Model *m, const Shape *s, const Slots *slots, const Pass *p, const Drawing *d, int64_t most) {
    int64_t *input = (int64_t *)p->token, *position = (int64_t *)p->position, n = p->n, done = 0;
    for (int more = 1; more && done < most; done++) {
        int64_t at = done * d->wide;
        ramulus_forward(m, s, slots, p);
        for (int64_t r = 0; r < n; r++) d->uniform[r] = uniform(d->stream[r], d->count[r]++);
        d->draw(p->logits, stride(s->vocabulary), n, s->vocabulary, s->threads, d->temperature, d->uniform, 0, d->token, d->logprob, d->entropy);
        for (int64_t r = 0; r < n; r++) {
            input[r] = d->tokens[at + r] = d->token[r], position[r]++;
            d->logprobs[at + r] = d->logprob[r], d->entropies[at + r] = d->entropy[r];
            if ((d->ends && d->ends[d->token[r]]) || d->entropy[r] != d->entropy[r]) more = 0;
        }
    }
    return done;
}

/* Of each move (source, target, n) the first n positions of one slot over another, in this order. */
void ramulus_copy(const Shape *s, const Slots *slots, const int64_t *moves, int64_t count) {
    int64_t line = slots->capacity * s->dim, row = s->kv_heads * line;
    for (int64_t l = 0; l < 2 * s->layers; l++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t *move = moves + 3 * i;
            cell *store = slots->store + l * slots->rows * row;
            for (int64_t h = 0; h < s->kv_heads; h++)
                memcpy(store + move[1] * row + h * line, store + move[0] * row + h * line, move[2] * s->dim * sizeof(cell));
        }
}
