/* Attention on a packed tree, forward and backward, for a CPU.
 *
 * A row is walked in preorder with its root path on a stack: a token's keys and values are laid out for products once, when it is pushed,
 * and every run below it finds them there. What is added to the gradients of a key and a value is kept beside them and written down when the
 * token is popped, so nothing is gathered, scattered or masked but the triangle of a run's own tokens.
 *
 * Queries, keys, values, answers and their gradients lie in memory as `stored`: real, or with -DBFLOAT16 bfloat16, widened when a row of them is
 * met and rounded to the nearest when one is written. All arithmetic, the levels and what a watch adds up are in real.
 *
 * learn/attention/compiled.py calls it.
 */
#include "vectors.h"

#define FEW 48       /* query rows met at once */
#define MUCH 65536   /* scores held at once, where that is more than a tile of rows */

/* A row: runs [start, stop) in preorder, each `before` tokens down its path; trees are the runs [tree[i], tree[i + 1]). */
typedef struct { const int64_t *start, *stop, *before, *tree; int64_t trees, depth; } Row;
typedef struct { int64_t heads, kv_heads, dim, threads; } Shape;
#ifdef BFLOAT16
typedef uint16_t stored;
#else
typedef REAL stored;
#endif
/* Strides between tokens and heads of a tensor; a head's numbers lie together. */
typedef struct { stored *at; int64_t token, head; } Tensor;
/* What queries add to the keys of their paths: entries [first[t], first[t + 1]) of token t, each `weight` times its attention to the keys before
 * `limit`, added to sums [heads, columns] from column `base` on; no column is of two trees; columns is 0 where nobody watches. */
typedef struct { const int64_t *first, *base, *limit; const real *weight; real *sums; int64_t columns; } Watch;

typedef struct {
    int64_t depth, dim; /* both padded to panels */
    real *key, *value;  /* [depth / P][dim][P] of keys; [dim / P][depth][P] of values */
    real *turned_key, *turned_value; /* backward: keys as values lie, and values as keys */
    real *dkey, *dvalue; /* [depth][dim] */
    real *query, *answer; /* [FEW][dim] */
    real *scores, *pulls; /* [rows][line] */
    real *query_panel, *answer_panel; /* [dim / P][FEW][P] */
    int64_t *token;      /* [depth] */
} Stack;

ALWAYS int64_t line(int64_t depth) { return stride(depth); }
/* Numbers in the room for scores: MUCH, or a tile of rows, or all heads of one token. */
ALWAYS int64_t held(int64_t depth, const Shape *s) {
    int64_t shared = s->heads / s->kv_heads < FEW ? s->heads / s->kv_heads : FEW, rows = shared > R ? shared : R;
    return (line(depth) * rows > MUCH ? line(depth) * rows : MUCH) + P;
}

int64_t ramulus_attention_room(const Row *row, const Shape *s) {
    int64_t depth = padded(row->depth), dim = padded(s->dim);
    int64_t each = 6 * depth * dim + 4 * FEW * dim + 2 * held(depth, s) + (depth * sizeof(int64_t)) / sizeof(real) + 64;
    return s->threads * padded(each);
}

static Stack stack_of(real *room, const Row *row, const Shape *s) {
    Stack k = {.depth = padded(row->depth), .dim = padded(s->dim)};
    real **parts[] = {&k.key, &k.value, &k.turned_key, &k.turned_value, &k.dkey, &k.dvalue};
    k.token = (int64_t *)room, room += k.depth * sizeof(int64_t) / sizeof(real);
    for (int i = 0; i < 6; i++) *parts[i] = room, room += k.depth * k.dim;
    real **small[] = {&k.query, &k.answer, &k.query_panel, &k.answer_panel};
    for (int i = 0; i < 4; i++) *small[i] = room, room += FEW * k.dim;
    k.scores = room, k.pulls = room + held(k.depth, s);
    return k;
}

/* A row of numbers to be met: as it lies, or widened in `space`. */
ALWAYS const real *widened(const stored *x, int64_t n, real *space) {
#ifdef BFLOAT16
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        memcpy(space + i, &bits, sizeof bits);
    }
    return space;
#else
    return x;
#endif
}

/* Write a row of numbers down. */
ALWAYS void put(stored *to, const real *x, int64_t n) {
#ifdef BFLOAT16
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        to[i] = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* NaN stays NaN */
    }
#else
    memcpy(to, x, n * sizeof(real));
#endif
}

/* One row of numbers as column `at` of the panels [depth / P][dim][P]; those beyond dim stay as they are. */
ALWAYS void upright(real *panels, int64_t width, int64_t at, const real *x, int64_t dim) {
    real *to = panels + at / P * width * P + at % P;
    for (int64_t i = 0; i < dim; i++) to[i * P] = x[i];
}

/* One row of numbers as line `at` of the panels [dim / P][depth][P], zeros beyond dim. */
ALWAYS void flat(real *panels, int64_t depth, int64_t at, const real *x, int64_t dim) {
    for (int64_t c = 0; c < padded(dim); c += P) {
        real *to = panels + (c / P * depth + at) * P;
        if (dim - c >= P) memcpy(to, x + c, P * sizeof(real));
        else for (int i = 0; i < P; i++) to[i] = c + i < dim ? x[c + i] : 0;
    }
}

/* Put the run's tokens on the stack, in place of what was below its parent. */
static void push(Stack *k, const Row *row, int64_t run, const Tensor *key, const Tensor *value, int64_t h, int64_t dim, int backward) {
    int64_t at = row->before[run];
    for (int64_t t = row->start[run]; t < row->stop[run]; t++, at++) {
        const real *a = widened(key->at + t * key->token + h * key->head, dim, k->query);
        const real *b = widened(value->at + t * value->token + h * value->head, dim, k->answer);
        upright(k->key, dim, at, a, dim);
        flat(k->value, k->depth, at, b, dim);
        k->token[at] = t;
        if (!backward) continue;
        flat(k->turned_key, k->depth, at, a, dim);
        upright(k->turned_value, dim, at, b, dim);
        memset(k->dkey + at * k->dim, 0, k->dim * sizeof(real));
        memset(k->dvalue + at * k->dim, 0, k->dim * sizeof(real));
    }
}

/* scores[n, count) = x [n, dim] times the panels of the stack. */
static void against(int n, const real *x, int64_t ldx, const real *panels, int64_t dim, int64_t count, real *scores, int64_t lds) {
    for (int64_t c = 0; c < count; c += P) panel(n, x, ldx, panels + c * dim, dim, scores + c, lds, 0);
}

/* out[n, padded dim] = weights [n, count] times lines of the stack. */
static void through(int n, const real *weights, int64_t ldw, const real *lines, int64_t depth, int64_t dim, int64_t count, real *out) {
    for (int64_t c = 0; c < dim; c += P) panel(n, weights, ldw, lines + c * depth, count, out + c, dim, 0);
}

/* sums[count, dim] += weights [n, count] turned, times panels [dim / P][FEW][P] of n rows. */
static void across(int n, const real *weights, int64_t ldw, int64_t count, const real *panels, int64_t dim, real *sums) {
    for (int64_t c = 0; c < dim; c += P)
        for (int64_t j = 0; j < count; j += R) {
            int64_t some = count - j < R ? count - j : R;
            TILES(tile, some, weights + j, 1, ldw, panels + c * FEW, n, sums + j * dim + c, dim, 1)
        }
}

/* Rows that fit: as many tokens as their scores, and the buffers, have room for. */
ALWAYS int64_t tokens_at_once(const Shape *s, int64_t deep) {
    int64_t rows = held(deep, s) / line(deep), shared = s->heads / s->kv_heads;
    rows = rows < FEW ? rows : FEW;
    return rows / shared > 0 ? rows / shared : 1;
}

/* Where a row of `count` scores ends in whole vectors; the rest of them is set to `nothing`. */
ALWAYS int64_t closed(real *scores, int64_t count, real nothing) {
    int64_t end = (count + W - 1) / W * W;
    for (int64_t j = count; j < end; j++) scores[j] = nothing;
    return end;
}

/* Scores to probabilities up to a factor, which is returned; zeros from `count` to `end`; `level` is the logarithm of their sum. */
static real soften(real *scores, int64_t count, int64_t end, real *level) {
    int64_t whole = closed(scores, count, -INFINITY);
    vf top = load(scores), sum = {0};
    for (int64_t j = W; j < whole; j += W) {
        vf x = load(scores + j);
        top = either(x > top, x, top);
    }
    real most = highest(top);
    for (int64_t j = 0; j < whole; j += W) {
        vf e = exponential(load(scores + j) - most);
        store(scores + j, e);
        sum += e;
    }
    for (int64_t j = whole; j < end; j++) scores[j] = 0;
    real all = total(sum);
    *level = most + (real)log(all);
    return 1 / all;
}

/* sums[0..limit) += weight * p */
static void fold(const real *p, real weight, int64_t limit, real *sums) {
    int64_t j = 0;
    for (; j + W <= limit; j += W) store(sums + j, load(sums + j) + weight * load(p + j));
    for (; j < limit; j++) sums[j] += weight * p[j];
}

/* The run's answers for the query heads of one key head. */
static void answer(Stack *k, const Row *row, int64_t run, const Shape *s, int64_t h, real scale, const Tensor *query, const Watch *watch, stored *out,
                   real *level) {
    int64_t dim = s->dim, shared = s->heads / s->kv_heads, at = row->before[run], t = row->start[run];
    while (t < row->stop[run]) {
        int64_t step = tokens_at_once(s, row->depth), end = t + step < row->stop[run] ? t + step : row->stop[run];
        int64_t deep = at + end - row->start[run], lds = line(deep);
        for (int64_t first = 0; first < shared; first += FEW) { /* more heads than rows only in odd models */
            int64_t heads = shared - first < FEW ? shared - first : FEW;
            int n = (int)((end - t) * heads);
            for (int r = 0; r < n; r++) {
                real *scaled = k->query + r * k->dim;
                const real *q = widened(query->at + (t + r / heads) * query->token + (h * shared + first + r % heads) * query->head, dim, scaled);
                for (int64_t i = 0; i < dim; i++) scaled[i] = q[i] * scale;
            }
            against(n, k->query, k->dim, k->key, dim, deep, k->scores, lds);
            for (int r = 0; r < n; r++) {
                int64_t token = t + r / heads, head = h * shared + first + r % heads;
                real factor = soften(k->scores + r * lds, at + token - row->start[run] + 1, padded(deep), level + token * s->heads + head);
                k->answer[r] = factor;
                if (watch->columns)
                    for (int64_t e = watch->first[token]; e < watch->first[token + 1]; e++)
                        fold(k->scores + r * lds, watch->weight[e] * factor, watch->limit[e], watch->sums + head * watch->columns + watch->base[e]);
            }
            through(n, k->scores, lds, k->value, k->depth, k->dim, deep, k->query);
            for (int r = 0; r < n; r++) {
                real *numbers = k->query + r * k->dim;
                for (int64_t i = 0; i < dim; i++) numbers[i] *= k->answer[r];
                put(out + ((t + r / heads) * s->heads + h * shared + first + r % heads) * dim, numbers, dim);
            }
        }
        t = end;
    }
}

/* out [tokens, heads, dim] and level [tokens, heads], the log-sum-exp of each query's scores. */
void ramulus_attention(const Row *row, const Shape *s, const Tensor *query, const Tensor *key, const Tensor *value, const Watch *watch, double scale,
                      stored *out, real *level, real *room) {
    int64_t each = ramulus_attention_room(row, s) / s->threads;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t unit = 0; unit < s->kv_heads * row->trees; unit++) {
        int64_t mine = 0, h = unit % s->kv_heads, tree = unit / s->kv_heads;
#ifdef _OPENMP
        mine = omp_get_thread_num();
#endif
        Stack k = stack_of(room + mine * each, row, s);
        for (int64_t run = row->tree[tree]; run < row->tree[tree + 1]; run++) {
            push(&k, row, run, key, value, h, s->dim, 0);
            answer(&k, row, run, s, h, (real)scale, query, watch, out, level);
        }
    }
}

/* Gradients of the run's queries, and what they add to those of the keys and values on the stack. */
static void pull(Stack *k, const Row *row, int64_t run, const Shape *s, int64_t h, real scale, const Tensor *query, const Tensor *given,
                 const stored *out, const real *level, const Tensor *dquery) {
    int64_t dim = s->dim, shared = s->heads / s->kv_heads, at = row->before[run], t = row->start[run];
    while (t < row->stop[run]) {
        int64_t step = tokens_at_once(s, row->depth), end = t + step < row->stop[run] ? t + step : row->stop[run];
        int64_t deep = at + end - row->start[run], lds = line(deep);
        for (int64_t first = 0; first < shared; first += FEW) {
            int64_t heads = shared - first < FEW ? shared - first : FEW;
            int n = (int)((end - t) * heads);
            real delta[FEW];
            for (int r = 0; r < n; r++) {
                int64_t token = t + r / heads, head = h * shared + first + r % heads;
                real *scaled = k->query + r * k->dim, *pulled = k->answer + r * k->dim;
                const real *q = widened(query->at + token * query->token + head * query->head, dim, scaled);
                const real *d = widened(given->at + token * given->token + head * given->head, dim, pulled);
                const real *o = widened(out + (token * s->heads + head) * dim, dim, k->scores);
                delta[r] = 0;
                for (int64_t i = 0; i < dim; i++) scaled[i] = q[i] * scale, pulled[i] = d[i], delta[r] += d[i] * o[i];
                flat(k->query_panel, FEW, r, scaled, dim);
                flat(k->answer_panel, FEW, r, pulled, dim);
            }
            against(n, k->query, k->dim, k->key, dim, deep, k->scores, lds);
            against(n, k->answer, k->dim, k->turned_value, dim, deep, k->pulls, lds);
            for (int r = 0; r < n; r++) {
                int64_t token = t + r / heads, count = at + token - row->start[run] + 1;
                real *p = k->scores + r * lds, *g = k->pulls + r * lds, high = level[token * s->heads + h * shared + first + r % heads];
                int64_t whole = closed(p, count, -INFINITY);
                closed(g, count, 0);
                for (int64_t j = 0; j < whole; j += W) {
                    vf e = exponential(load(p + j) - high);
                    store(p + j, e);
                    store(g + j, e * (load(g + j) - delta[r]));
                }
                for (int64_t j = whole; j < padded(deep); j++) p[j] = g[j] = 0;
            }
            across(n, k->scores, lds, deep, k->answer_panel, k->dim, k->dvalue);
            across(n, k->pulls, lds, deep, k->query_panel, k->dim, k->dkey);
            through(n, k->pulls, lds, k->turned_key, k->depth, k->dim, deep, k->query);
            for (int r = 0; r < n; r++) {
                real *numbers = k->query + r * k->dim;
                for (int64_t i = 0; i < dim; i++) numbers[i] *= scale;
                put(dquery->at + (t + r / heads) * dquery->token + (h * shared + first + r % heads) * dquery->head, numbers, dim);
            }
        }
        t = end;
    }
}

/* Write down the gradients of the keys and values from depth `from` to `to`, which no later query sees. */
static void pop(Stack *k, int64_t from, int64_t to, int64_t h, int64_t dim, const Tensor *dkey, const Tensor *dvalue) {
    for (int64_t at = from; at < to; at++) {
        int64_t t = k->token[at];
        put(dkey->at + t * dkey->token + h * dkey->head, k->dkey + at * k->dim, dim);
        put(dvalue->at + t * dvalue->token + h * dvalue->head, k->dvalue + at * k->dim, dim);
    }
}

void ramulus_attention_backward(const Row *row, const Shape *s, const Tensor *query, const Tensor *key, const Tensor *value, const Tensor *given,
                               double scale, const stored *out, const real *level, const Tensor *dquery, const Tensor *dkey, const Tensor *dvalue,
                               real *room) {
    int64_t each = ramulus_attention_room(row, s) / s->threads;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t unit = 0; unit < s->kv_heads * row->trees; unit++) {
        int64_t mine = 0, h = unit % s->kv_heads, tree = unit / s->kv_heads, high = 0;
#ifdef _OPENMP
        mine = omp_get_thread_num();
#endif
        Stack k = stack_of(room + mine * each, row, s);
        for (int64_t run = row->tree[tree]; run < row->tree[tree + 1]; run++) {
            pop(&k, row->before[run], high, h, s->dim, dkey, dvalue);
            push(&k, row, run, key, value, h, s->dim, 1);
            high = row->before[run] + row->stop[run] - row->start[run];
            pull(&k, row, run, s, h, (real)scale, query, given, out, level, dquery);
        }
        pop(&k, 0, high, h, s->dim, dkey, dvalue);
    }
}

int64_t ramulus_attention_lanes(void) { return W; }
