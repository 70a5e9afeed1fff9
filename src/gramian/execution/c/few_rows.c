/* A few rows times a chain of stacks of matrices, in one call: y = x A_1^T ... A_n^T + bias, with numbers that move in between.

   A product of few rows takes as long as reading the weights. So every weight is read once, in the order it lies in, by all
   threads; what is small (rows, places, bias) stays in the caches. Sums are in float32, whatever the weights are. */

#include "numbers.h"

#define OUTPUTS 4 /* rows of a weight that are read side by side */
#if defined(__AVX512F__) || defined(__aarch64__)
#define BATCH 6 /* rows of x that they meet in registers */
#else
#define BATCH 2
#endif
#define AHEAD 4096  /* bytes that are asked for before they are needed, */
#define FIRST 8192  /* and of each stack, while the one before it is still at work */
#define CHUNK 65536 /* numbers of a weight that a cache holds, while more than BATCH rows meet them */

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

/* A stack of `groups` matrices (out, in), `stride` numbers from one to the next; group g multiplies the g-th `in` numbers.
   Output r becomes number place[r] of the `size` of the next vector, or nothing (-1); NULL: in order. */
typedef struct {
    const void *values;
    const int32_t *place;
    int64_t groups, out, in, stride, size;
    int64_t sparse; /* some places get nothing, and are zero */
} Stack;

/* y = x A_1^T ... A_n^T: x of `columns` numbers a row, of which the first stack multiplies the `taken` numbers x[take[i]], 0 for
   -1; NULL: all of x, in order. Weights, x, bias and y are of one kind: float32, or bfloat16 (half). */
typedef struct {
    const Stack *stacks;
    const int32_t *take;
    int64_t count, taken, columns, half;
} Chain;

/* Sums over a vector ---------------------------------------------------------------------------------------------------- */

#ifdef PICK
INLINE Four fold(Vector v) {
#if LANES == 16
    typedef float Eight __attribute__((vector_size(32)));
    Eight half = PICK(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return PICK(half, half, 0, 1, 2, 3) + PICK(half, half, 4, 5, 6, 7);
#elif LANES == 8
    return PICK(v, v, 0, 1, 2, 3) + PICK(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

INLINE Four sums(Vector a, Vector b, Vector c, Vector d) {
    Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    Four pq = PICK(p, q, 0, 4, 1, 5) + PICK(p, q, 2, 6, 3, 7);
    Four rs = PICK(r, s, 0, 4, 1, 5) + PICK(r, s, 2, 6, 3, 7);
    return PICK(pq, rs, 0, 1, 4, 5) + PICK(pq, rs, 2, 3, 6, 7);
}
#else
INLINE Four fold(Vector v) {
    Four sum = {0};
    UNROLL for (int i = 0; i < LANES; i++) sum[i % 4] += v[i];
    return sum;
}

INLINE Four sums(Vector a, Vector b, Vector c, Vector d) {
    Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    return (Four){p[0] + p[1] + p[2] + p[3], q[0] + q[1] + q[2] + q[3], r[0] + r[1] + r[2] + r[3], s[0] + s[1] + s[2] + s[3]};
}
#endif

/* Products -------------------------------------------------------------------------------------------------------------- */

/* `outputs` (OUTPUTS or 1) rows of a weight, from number `at` on, times `batch` rows of x: y[b * across + r]. */
INLINE void tile(const int outputs, const int batch, const int half, const void *values, int64_t at, int64_t in, const float *x,
                 int64_t width, int64_t ahead, float *y, int64_t across) {
    Vector sum[OUTPUTS][BATCH], w[OUTPUTS];
    UNROLL for (int r = 0; r < outputs; r++) UNROLL for (int b = 0; b < batch; b++) sum[r][b] = (Vector){0};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        UNROLL for (int r = 0; r < outputs; r++) {
            int64_t here = at + r * in + i;
            w[r] = many(values, here, half);
            __builtin_prefetch((const char *)values + here * (half ? 2 : 4) + ahead);
        }
        UNROLL for (int b = 0; b < batch; b++) {
            Vector v = *(const Vector *)(x + b * width + i);
            UNROLL for (int r = 0; r < outputs; r++) sum[r][b] += w[r] * v;
        }
    }
    UNROLL for (int b = 0; b < batch; b++) {
        if (outputs == OUTPUTS) *(Four *)(y + b * across) = sums(sum[0][b], sum[1][b], sum[2][b], sum[3][b]);
        else {
            Four four = fold(sum[0][b]);
            y[b * across] = four[0] + four[1] + four[2] + four[3];
        }
    }
    for (; i < in; i++) UNROLL for (int r = 0; r < outputs; r++) {
        float value = one(values, at + r * in + i, half);
        UNROLL for (int b = 0; b < batch; b++) y[b * across + r] += value * x[b * width + i];
    }
}

/* Outputs lo .. hi - 1 of a stack. */
INLINE void span(const int batch, const int half, const Stack *s, int64_t lo, int64_t hi, const float *x, int64_t width, float *y,
                 int64_t across) {
    int64_t in = s->in, bytes = OUTPUTS * in * (half ? 2 : 4), ahead = (AHEAD + bytes - 1) / bytes * bytes, group = lo / s->out;
    for (int64_t r = lo; r < hi; group++) {
        int64_t end = (group + 1) * s->out, at = group * s->stride + (r - group * s->out) * in;
        const float *from = x + group * in;
        if (end > hi) end = hi;
        for (; r + OUTPUTS <= end; r += OUTPUTS, at += OUTPUTS * in)
            tile(OUTPUTS, batch, half, s->values, at, in, from, width, ahead, y + r, across);
        for (; r < end; r++, at += in) tile(1, batch, half, s->values, at, in, from, width, ahead, y + r, across);
    }
}

typedef void Span(const Stack *, int64_t, int64_t, const float *, int64_t, float *, int64_t);
#define SPAN(name, batch, half)                                                                                             \
    static void name(const Stack *s, int64_t lo, int64_t hi, const float *x, int64_t width, float *y, int64_t across) {     \
        span(batch, half, s, lo, hi, x, width, y, across);                                                                  \
    }
SPAN(full_1, 1, 0) SPAN(full_2, 2, 0) SPAN(half_1, 1, 1) SPAN(half_2, 2, 1)
#if BATCH == 6
SPAN(full_3, 3, 0) SPAN(full_4, 4, 0) SPAN(full_5, 5, 0) SPAN(full_6, 6, 0)
SPAN(half_3, 3, 1) SPAN(half_4, 4, 1) SPAN(half_5, 5, 1) SPAN(half_6, 6, 1)
static Span *const SPANS[2][BATCH] = {{full_1, full_2, full_3, full_4, full_5, full_6},
                                      {half_1, half_2, half_3, half_4, half_5, half_6}};
#else
static Span *const SPANS[2][BATCH] = {{full_1, full_2}, {half_1, half_2}};
#endif

/* Outputs lo .. hi - 1 of a stack, of any number of rows of x. */
static void product(const Stack *s, int half, int batch, int64_t lo, int64_t hi, const float *x, int64_t width, float *y,
                    int64_t across) {
    int64_t chunk = batch <= BATCH ? hi - lo : (1 + CHUNK / (s->in + 1) / OUTPUTS) * OUTPUTS;
    for (int64_t r = lo; r < hi; r += chunk)
        for (int done = 0; done < batch; done += BATCH) {
            int now = batch - done < BATCH ? batch - done : BATCH;
            SPANS[half][now - 1](s, r, r + chunk < hi ? r + chunk : hi, x + done * width, width, y + done * across, across);
        }
}

/* Where the part of a stack's outputs begins that a thread makes. */
INLINE int64_t part(const Stack *s, int thread) {
    int64_t made = s->groups * s->out;
    return thread == all_threads() ? made : share(made / OUTPUTS, thread) * OUTPUTS;
}

INLINE void ask(const Stack *s, int64_t output, int half) {
    int64_t from = output / s->out * s->stride + output % s->out * s->in;
    for (int i = 0; i < FIRST; i += 64) __builtin_prefetch((const char *)s->values + from * (half ? 2 : 4) + i);
}

/* x (batch, columns) -> y (batch, size of the last stack); bias: one number for each column of y, or NULL. Returns 1 without
   memory. */
int gramian_few_rows(const Chain *chain, int batch, const void *x, const void *bias, void *y, int threads) {
    const Stack *stacks = chain->stacks, *last = stacks + chain->count - 1;
    const int32_t *take = chain->take;
    int count = chain->count, half = chain->half;
    int64_t taken = chain->taken, columns = chain->columns, kept = 0, most = 0, work = 0;
    for (int k = 0; k < count; k++) {
        int64_t made = stacks[k].groups * stacks[k].out;
        if (k + 1 < count) kept += stacks[k].size * batch;
        if (made > most) most = made;
        work += made * stacks[k].in * batch;
    }
    int gather = half || take;
    float *scratch = malloc((kept + most * batch + (gather ? taken * batch : 0) + 1) * sizeof(float));
    if (!scratch) return 1;
    float *flat = scratch + kept, *gathered = flat + most * batch;
    if (gather)
        for (int b = 0; b < batch; b++)
            for (int64_t i = 0; i < taken; i++) {
                int64_t from = take ? take[i] : i;
                gathered[b * taken + i] = from < 0 ? 0 : one(x, b * columns + from, half);
            }
    float *next = scratch;
    for (int k = 0; k + 1 < count; next += stacks[k++].size * batch)
        if (stacks[k].sparse) memset(next, 0, stacks[k].size * batch * sizeof(float));
    if (last->sparse)
        for (int b = 0; b < batch; b++)
            for (int64_t i = 0; i < last->size; i++) put(y, b * last->size + i, bias ? one(bias, i, half) : 0, half);
    threads = worth(threads, work);
    PARALLEL(threads) {
        int thread = this_thread();
        const float *from = gather ? gathered : x;
        int64_t width = taken;
        float *to = scratch;
        ask(stacks, part(stacks, thread), half);
        for (int k = 0; k < count; k++) {
            const Stack *s = stacks + k;
            int64_t made = s->groups * s->out, lo = part(s, thread), hi = part(s, thread + 1);
            int end = k + 1 == count, direct = !s->place && !(end && (half || bias));
            if (direct) product(s, half, batch, lo, hi, from, width, end ? (float *)y : to, made);
            else product(s, half, batch, lo, hi, from, width, flat, made);
            if (!direct)
                for (int b = 0; b < batch; b++)
                    for (int64_t r = lo; r < hi; r++) {
                        int64_t place = s->place ? s->place[r] : r;
                        float value = flat[b * made + r];
                        if (place < 0) continue;
                        if (end) put(y, b * s->size + place, bias ? value + one(bias, place, half) : value, half);
                        else to[b * s->size + place] = value;
                    }
            if (end) break;
            ask(s + 1, part(s + 1, thread), half);
            BARRIER;
            from = to;
            width = s->size;
            to += s->size * batch;
        }
    }
    free(scratch);
    return 0;
}
