/* Attention on a packed tree, forward and backward, for a CPU.
 *
 * A row is walked in preorder with its root path on a stack: a token's keys and values are laid out for products once, when it is pushed,
 * and every run below it finds them there. What is added to the gradients of a key and a value is kept beside them and written down when the
 * token is popped, so nothing is gathered, scattered or masked but the triangle of a run's own tokens.
 *
 * Queries, keys, values, answers and their gradients lie in memory as `stored`: real, or with -DBFLOAT16 bfloat16. What enters a product is stored
 * (of bfloat16 probabilities and pulls are rounded to it); sums, softmax, levels and what a watch adds up are in real.
 *
 * learn/attention/kernels.py calls it.
 */
#ifdef BFLOAT16
#define BFLOAT
#include "cells.h"
typedef cell stored;
#else
#include "vectors.h"
#define PAIR 1
typedef REAL stored;
#endif

#define FEW 48       /* query rows met at once */
#define MUCH 65536   /* scores held at once, where that is more than a tile of rows */

/* A row: runs [start, stop) in preorder, each `before` tokens down its path; trees are the runs [tree[i], tree[i + 1]). */
typedef struct { const int64_t *start, *stop, *before, *tree; int64_t trees, depth; } Row;
typedef struct { int64_t heads, kv_heads, dim, threads; } Shape;
/* Strides between tokens and heads of a tensor; a head's numbers lie together. */
typedef struct { stored *at; int64_t token, head; } Tensor;
/* What queries add to the keys of their paths: entries [first[t], first[t + 1]) of token t, each `weight` times its attention to the keys before
 * `limit`, added to sums [heads, columns] from column `base` on; no column is of two trees; columns is 0 where nobody watches. */
typedef struct { const int64_t *first, *base, *limit; const real *weight; real *sums; int64_t columns; } Watch;

typedef struct {
    int64_t depth, dim; /* both padded to panels */
    stored *key, *value; /* [depth / P][dim / PAIR][P][PAIR] of keys; [dim / P][depth / PAIR][P][PAIR] of values */
    stored *turned_key, *turned_value; /* backward: keys as values lie, and values as keys */
    real *dkey, *dvalue; /* [depth][dim] */
    stored *query, *given; /* [FEW][dim] */
    real *answer;        /* [FEW][dim] */
    real *scores, *pulls; /* [rows][line] */
    stored *narrow;      /* [rows][line]: of bfloat16 */
    stored *query_panel, *given_panel; /* [dim / P][FEW / PAIR][P][PAIR]; turned: [dim][FEW] */
    int64_t *token;      /* [depth] */
    int turned;          /* whether dkey and dvalue are [dim][depth], as the matrix unit sums them */
} Stack;

ALWAYS int64_t line(int64_t depth) { return stride(depth); }
/* Numbers in the room for scores: MUCH, or a tile of rows, or all heads of one token. */
ALWAYS int64_t held(int64_t depth, const Shape *s) {
    int64_t shared = s->heads / s->kv_heads < FEW ? s->heads / s->kv_heads : FEW, rows = shared > R ? shared : R;
    return (line(depth) * rows > MUCH ? line(depth) * rows : MUCH) + P;
}

int64_t ramulus_attention_room(const Row *row, const Shape *s) {
    int64_t depth = padded(row->depth), dim = padded(s->dim);
    int64_t each = 6 * depth * dim + 5 * FEW * dim + 3 * held(depth, s) + (depth * sizeof(int64_t)) / sizeof(real) + 64;
    return s->threads * padded(each);
}

static Stack stack_of(real *room, const Row *row, const Shape *s) {
    Stack k = {.depth = padded(row->depth), .dim = padded(s->dim)};
    stored **panels[] = {&k.key, &k.value, &k.turned_key, &k.turned_value}, **rows[] = {&k.query, &k.given, &k.query_panel, &k.given_panel};
    k.token = (int64_t *)room, room += k.depth * sizeof(int64_t) / sizeof(real);
    for (int i = 0; i < 4; i++) *panels[i] = (stored *)room, room += k.depth * k.dim;
    for (int i = 0; i < 4; i++) *rows[i] = (stored *)room, room += FEW * k.dim;
    k.dkey = room, k.dvalue = room + k.depth * k.dim, k.answer = room + 2 * k.depth * k.dim, room = k.answer + FEW * k.dim;
    k.scores = room, k.pulls = room + held(k.depth, s), k.narrow = (stored *)(room + 2 * held(k.depth, s));
#ifdef MATRIX
    k.turned = matrix();
#endif
    return k;
}

ALWAYS int64_t even(int64_t n) { return (n + PAIR - 1) / PAIR * PAIR; }

/* A row of numbers as products take it: up to whole pairs. */
ALWAYS void take(stored *to, const stored *x, int64_t n) {
    memcpy(to, x, n * sizeof(stored));
    if (n % PAIR) to[n] = 0;
}

#ifdef BFLOAT16
ALWAYS vf met(const stored *x) { return widen(x); }
ALWAYS real one(const stored *x) { return single(x); }
#else
ALWAYS vf met(const stored *x) { return load(x); }
ALWAYS real one(const stored *x) { return *x; }
#endif

ALWAYS real inner(const stored *a, const stored *b, int64_t n) {
    vf sum = {0};
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += met(a + i) * met(b + i);
    real all = total(sum);
    for (; i < n; i++) all += one(a + i) * one(b + i);
    return all;
}

/* Write a row of numbers down. */
ALWAYS void put(stored *to, const real *x, int64_t n) {
#ifdef BFLOAT16
    int64_t i = 0;
    for (; i + W <= n; i += W) narrow(to + i, load(x + i));
    cell rest[W];
    real last[W] = {0};
    memcpy(last, x + i, (n - i) * sizeof(real));
    narrow(rest, load(last));
    memcpy(to + i, rest, (n - i) * sizeof(cell));
#else
    memcpy(to, x, n * sizeof(real));
#endif
}

/* One row of numbers as column `at` of the panels [depth / P][dim / PAIR][P][PAIR]; those beyond dim stay as they are. */
ALWAYS void upright(stored *panels, int64_t width, int64_t at, const stored *x, int64_t dim) {
    stored *to = panels + at / P * width * P + at % P * PAIR;
    for (int64_t i = 0; i + PAIR <= dim; i += PAIR) memcpy(to + i * P, x + i, PAIR * sizeof(stored));
    if (dim % PAIR) to[dim / PAIR * PAIR * P] = x[dim - 1], to[dim / PAIR * PAIR * P + 1] = 0;
}

/* One row of numbers as line `at` of the panels [dim / P][depth / PAIR][P][PAIR], zeros beyond dim and in the line that makes a pair with it. */
ALWAYS void flat(stored *panels, int64_t depth, int64_t at, const stored *x, int64_t dim) {
    for (int64_t c = 0; c < padded(dim); c += P) {
        stored *to = panels + (c / P * depth + at / PAIR * PAIR) * P;
#ifdef BFLOAT16
        cell some[P] = {0};
        memcpy(some, x + c, (dim - c < P ? dim - c : P) * sizeof(cell));
        for (int i = 0; i < P; i += W) {
            wordsu *pairs = (wordsu *)(to + i * PAIR);
            words bits = __builtin_convertvector(*(const cells *)(some + i), words);
            if (at % PAIR) *pairs = ((words)*pairs & 0xFFFF) | bits << 16;
            else *pairs = bits;
        }
#else
        if (dim - c >= P) memcpy(to, x + c, P * sizeof(real));
        else for (int i = 0; i < P; i++) to[i] = c + i < dim ? x[c + i] : 0;
#endif
    }
}

/* Zeros from line `at` of panels to the end of a step: whole steps are met, and what lies there met before is of another branch. */
ALWAYS void close_step(const Stack *k, stored *panels, int64_t at) {
    for (int64_t c = 0; c < k->dim; c += P)
        memset(panels + (c / P * k->depth + even(at)) * P, 0, (padded(at) - even(at)) * P * sizeof(stored));
}

/* Put the run's tokens on the stack, in place of what was below its parent. */
static void push(Stack *k, const Row *row, int64_t run, const Tensor *key, const Tensor *value, int64_t h, int64_t dim, int backward) {
    int64_t at = row->before[run];
    for (int64_t t = row->start[run]; t < row->stop[run]; t++, at++) {
        const stored *a = key->at + t * key->token + h * key->head, *b = value->at + t * value->token + h * value->head;
        upright(k->key, even(dim), at, a, dim);
        flat(k->value, k->depth, at, b, dim);
        k->token[at] = t;
        if (!backward) continue;
        flat(k->turned_key, k->depth, at, a, dim);
        upright(k->turned_value, even(dim), at, b, dim);
    }
    if (k->turned) close_step(k, k->value, at);
    if (!backward) return;
    if (k->turned) close_step(k, k->turned_key, at);
    int64_t first = row->before[run], count = at - first, lines = k->turned ? k->dim : count, length = k->turned ? count : k->dim;
    for (int64_t i = 0; i < lines; i++) {
        int64_t from = k->turned ? i * k->depth + first : (first + i) * k->dim;
        memset(k->dkey + from, 0, length * sizeof(real));
        memset(k->dvalue + from, 0, length * sizeof(real));
    }
}

/* out[n, P * count] = x[n, k] times panels, `apart` numbers from one to the next. */
ALWAYS void meet(int n, const stored *x, int64_t ldx, const stored *w, int64_t apart, int64_t count, int64_t k, real *out, int64_t ldo) {
#ifdef MATRIX
    if (matrix()) {
        by_matrix(n, x, ldx, (Lines){(const char *)w, P * sizeof(word), apart * sizeof(stored), count, 0}, k, out, ldo, 0);
        return;
    }
#endif
    for (int64_t c = 0; c < count; c++, w += apart, out += P) {
#ifdef BFLOAT16
        for (int r = 0; r < n; r += R) {
            int some = n - r < R ? n - r : R;
            TILES(tile_of_pairs, some, x + r * ldx, ldx, w, k, out + r * ldo, ldo, 0)
        }
#else
        panel(n, x, ldx, w, k, out, ldo, 0);
#endif
    }
}

/* scores[n, count) = x [n, dim] times the panels of the stack. */
static void against(int n, const stored *x, int64_t ldx, const stored *panels, int64_t dim, int64_t count, real *scores, int64_t lds) {
    meet(n, x, ldx, panels, even(dim) * P, padded(count) / P, even(dim), scores, lds);
}

/* out[n, padded dim] = weights [n, count], zeros behind, times lines of the stack. */
static void through(int n, const stored *weights, int64_t ldw, const Stack *k, const stored *lines, int64_t dim, int64_t count, real *out) {
    meet(n, weights, ldw, lines, k->depth * P, padded(dim) / P, k->turned ? padded(count) : even(count), out, k->dim);
}

#ifdef BFLOAT16
/* out[r, 0..P) += the sum over pairs i of the pair r of x [k / 2][ldx] times w[i, 0..P). */
ALWAYS void tile_across(const int n, const word *x, int64_t ldx, const cell *w, int64_t k, real *out, int64_t ldo) {
    vf sum[R][2];
    for (int r = 0; r < n; r++) sum[r][0] = load(out + r * ldo), sum[r][1] = load(out + r * ldo + W);
    for (int64_t i = 0; i < k / PAIR; i++) {
        words a = *(const wordsu *)(w + i * PAIR * P), b = *(const wordsu *)(w + i * PAIR * P + PAIR * W);
        for (int r = 0; r < n; r++) {
            words both = x[i * ldx + r] - (words){0};
            sum[r][0] = dots(sum[r][0], a, both);
            sum[r][1] = dots(sum[r][1], b, both);
        }
    }
    for (int r = 0; r < n; r++) store(out + r * ldo, sum[r][0]), store(out + r * ldo + W, sum[r][1]);
}

/* The bits of the nearest bfloat16 in each lane. */
ALWAYS words nearest(vf v) {
    cell some[W];
    narrow(some, v);
    return __builtin_convertvector(*(const cells *)some, words);
}

/* Rows of real [n, line), rounded, as pairs of rows where the first of each pair lies. */
static void pair_up(int n, real *rows, int64_t line, int64_t count) {
    for (int r = 0; r < n; r += 2) {
        real *a = rows + r * line, *b = r + 1 < n ? a + line : 0;
        for (int64_t j = 0; j < count; j += W) *(wordsu *)(a + j) = nearest(load(a + j)) | (b ? nearest(load(b + j)) << 16 : (words){0});
    }
}
#endif

/* Rows of real [n, line) as products take them, in `space` or as they lie. */
static const stored *squeezed(int n, const real *rows, int64_t line, int64_t count, stored *space) {
#ifdef BFLOAT16
    for (int r = 0; r < n; r++)
        for (int64_t j = 0; j < count; j += W) narrow(space + r * line + j, load(rows + r * line + j));
    return space;
#else
    return rows;
#endif
}

/* sums[count, dim] += weights [n, count] turned (of bfloat16 in pairs of rows), times panels [dim / P][FEW][P] of n rows; or where the stack is turned,
 * sums[dim, count] += panels [dim][FEW] times them. */
static void across(int n, const real *weights, int64_t ldw, int64_t count, const stored *panels, const Stack *k, real *sums) {
    int64_t dim = k->dim;
#ifdef MATRIX
    if (k->turned) {
        Lines lines = {(const char *)weights, 2 * ldw * sizeof(real), P * sizeof(real), padded(count) / P, 0};
        by_matrix((int)dim, panels, FEW, lines, even(n), sums, k->depth, 1);
        return;
    }
#endif
    for (int64_t c = 0; c < dim; c += P)
        for (int64_t j = 0; j < count; j += R) {
            int64_t some = count - j < R ? count - j : R;
#ifdef BFLOAT16
            TILES(tile_across, some, (const word *)weights + j, 2 * ldw, panels + c * FEW, even(n), sums + j * dim + c, dim)
#else
            TILES(tile, some, weights + j, 1, ldw, panels + c * FEW, n, sums + j * dim + c, dim, 1)
#endif
        }
}

/* Row r of the rows that `across` meets; zeros beside the last. */
ALWAYS void aside(const Stack *k, stored *panels, int64_t r, const stored *x, int64_t dim) {
#ifdef MATRIX
    if (k->turned) {
        for (int64_t i = 0; i < dim; i++) {
            panels[i * FEW + r] = x[i];
            if (r % PAIR == 0) panels[i * FEW + r + 1] = 0;
        }
        return;
    }
#endif
    flat(panels, FEW, r, x, dim);
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

/* Scores, by `scale`, to probabilities up to a factor, which is returned; zeros from `count` to `end`; `level` is the logarithm of their sum. */
static real soften(real *scores, int64_t count, int64_t end, real scale, real *level) {
    int64_t whole = closed(scores, count, -INFINITY);
    vf top = load(scores), sum = {0};
    for (int64_t j = W; j < whole; j += W) {
        vf x = load(scores + j);
        top = either(x > top, x, top);
    }
    real most = highest(top);
    for (int64_t j = 0; j < whole; j += W) {
        vf e = exponential((load(scores + j) - most) * scale);
        store(scores + j, e);
        sum += e;
    }
    for (int64_t j = whole; j < end; j++) scores[j] = 0;
    real all = total(sum);
    *level = most * scale + (real)log(all);
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
            real factors[FEW];
            for (int r = 0; r < n; r++) {
                const stored *q = query->at + (t + r / heads) * query->token + (h * shared + first + r % heads) * query->head;
                take(k->query + r * k->dim, q, dim);
            }
            against(n, k->query, k->dim, k->key, dim, deep, k->scores, lds);
            for (int r = 0; r < n; r++) {
                int64_t token = t + r / heads, head = h * shared + first + r % heads;
                real factor = soften(k->scores + r * lds, at + token - row->start[run] + 1, padded(deep), scale, level + token * s->heads + head);
                factors[r] = factor;
                if (watch->columns)
                    for (int64_t e = watch->first[token]; e < watch->first[token + 1]; e++)
                        fold(k->scores + r * lds, watch->weight[e] * factor, watch->limit[e], watch->sums + head * watch->columns + watch->base[e]);
            }
            through(n, squeezed(n, k->scores, lds, padded(deep), k->narrow), lds, k, k->value, dim, deep, k->answer);
            for (int r = 0; r < n; r++) {
                real *numbers = k->answer + r * k->dim;
                for (int64_t i = 0; i < dim; i++) numbers[i] *= factors[r];
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
                stored *q = k->query + r * k->dim, *d = k->given + r * k->dim;
                take(q, query->at + token * query->token + head * query->head, dim);
                take(d, given->at + token * given->token + head * given->head, dim);
                delta[r] = inner(d, out + (token * s->heads + head) * dim, dim);
                aside(k, k->query_panel, r, q, dim);
                aside(k, k->given_panel, r, d, dim);
            }
            against(n, k->query, k->dim, k->key, dim, deep, k->scores, lds);
            against(n, k->given, k->dim, k->turned_value, dim, deep, k->pulls, lds);
            for (int r = 0; r < n; r++) {
                int64_t token = t + r / heads, count = at + token - row->start[run] + 1;
                real *p = k->scores + r * lds, *g = k->pulls + r * lds, high = level[token * s->heads + h * shared + first + r % heads];
                int64_t whole = closed(p, count, -INFINITY);
                closed(g, count, 0);
                for (int64_t j = 0; j < whole; j += W) {
                    vf e = exponential(load(p + j) * scale - high);
                    store(p + j, e);
                    store(g + j, e * (load(g + j) - delta[r]) * scale);
                }
                for (int64_t j = whole; j < padded(deep); j++) p[j] = g[j] = 0;
            }
            through(n, squeezed(n, k->pulls, lds, padded(deep), k->narrow), lds, k, k->turned_key, dim, deep, k->answer);
#ifdef BFLOAT16
            pair_up(n, k->scores, lds, padded(deep));
            pair_up(n, k->pulls, lds, padded(deep));
#endif
            across(n, k->scores, lds, deep, k->given_panel, k, k->dvalue);
            across(n, k->pulls, lds, deep, k->query_panel, k, k->dkey);
            for (int r = 0; r < n; r++) {
                const real *numbers = k->answer + r * k->dim;
                put(dquery->at + (t + r / heads) * dquery->token + (h * shared + first + r % heads) * dquery->head, numbers, dim);
            }
        }
        t = end;
    }
}

/* Write down the gradients of the keys and values from depth `from` to `to`, which no later query sees. */
static void pop(Stack *k, int64_t from, int64_t to, int64_t h, int64_t dim, const Tensor *dkey, const Tensor *dvalue) {
    const Tensor *all[] = {dkey, dvalue};
    const real *sums[] = {k->dkey, k->dvalue};
    for (int64_t at = from; at < to; at++)
        for (int i = 0; i < 2; i++) {
            const real *numbers = sums[i] + at * k->dim;
            if (k->turned) {
                for (int64_t d = 0; d < dim; d++) k->answer[d] = sums[i][d * k->depth + at];
                numbers = k->answer;
            }
            put(all[i]->at + k->token[at] * all[i]->token + h * all[i]->head, numbers, dim);
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
