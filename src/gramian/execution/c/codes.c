/* Products with a matrix of 2 to 8 bits an entry: of a few rows the weights are read as codes and become numbers in registers.

   y = Q S x, with Q[o, i] = scale[o, i / group] * level[code[o, i]] and S a rotation, or none. A word holds 32 / bits codes of one
   output; the words of LANES outputs, a tile, lie side by side, so that all of a vector meets the same number of x. */

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define AHEAD 2048 /* bytes that are asked for before they are needed */
#define MOST 8     /* rows of x that meet the codes at once */

typedef int32_t Numbers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
    const uint32_t *codes; /* (tiles, groups, words of a group, LANES), lowest bits first */
    const float *scales;   /* (tiles, groups, LANES) */
    const float *levels;   /* as many as the table has; NULL: level[c] = c - (2^bits - 1) / 2 */
    const float *signs;    /* (rounds, in) of +-1 */
    int64_t out, in, bits, group, rounds, rotation, half;
} Codes;

/* The levels of a vector of codes from the table of 16 << table; with no table (-1) the codes as numbers. */
INLINE Vector levels_of(Words codes, const float *levels, const int table) {
    if (table < 0) return __builtin_convertvector((Numbers)codes, Vector);
#ifdef __AVX512F__
#define PAIR(from) _mm512_permutex2var_ps(_mm512_loadu_ps(levels + (from)), index, _mm512_loadu_ps(levels + (from) + 16))
#define BIT(bit) _mm512_test_epi32_mask(index, _mm512_set1_epi32(bit))
#define QUAD(from) _mm512_mask_blend_ps(BIT(32), PAIR(from), PAIR((from) + 32))
#define EIGHT(from) _mm512_mask_blend_ps(BIT(64), QUAD(from), QUAD((from) + 64))
    __m512i index = (__m512i)codes;
    if (table == 0) return (Vector)_mm512_permutexvar_ps(index, _mm512_loadu_ps(levels));
    if (table == 1) return (Vector)PAIR(0);
    if (table == 2) return (Vector)QUAD(0);
    if (table == 3) return (Vector)EIGHT(0);
    return (Vector)_mm512_mask_blend_ps(BIT(128), EIGHT(0), EIGHT(128));
#else
    Vector found;
    UNROLL for (int i = 0; i < LANES; i++) found[i] = levels[codes[i]];
    return found;
#endif
}

INLINE int64_t in_word(const Codes *q) { return 32 / q->bits; }
INLINE int64_t group_words(const Codes *q) { return (q->group + in_word(q) - 1) / in_word(q); }
INLINE int64_t group_count(const Codes *q) { return (q->in + q->group - 1) / q->group; }

/* `tiles` tiles, the first the `first`-th, times `batch` rows of x, of `width` numbers, each group of them filled up with zeros to
   whole words: y[(b * tiles + t) * LANES + lane]. Without a table sums[b * groups + g] is what a group's codes count too much. */
INLINE void tile(const int tiles, const int batch, const int table, const Codes *q, int64_t first, const float *x, int64_t width,
                 const float *sums, float *y) {
    int64_t bits = q->bits, in = in_word(q), words = group_words(q), groups = group_count(q), length = groups * words * LANES;
    uint32_t mask = (1u << bits) - 1;
    const uint32_t *codes = q->codes + first * length;
    const float *scales = q->scales + first * groups * LANES;
    Vector total[tiles][batch];
    UNROLL for (int t = 0; t < tiles; t++) UNROLL for (int b = 0; b < batch; b++) total[t][b] = (Vector){0};
    for (int64_t g = 0; g < groups; g++, scales += LANES) {
        Vector sum[tiles][batch];
        UNROLL for (int t = 0; t < tiles; t++) UNROLL for (int b = 0; b < batch; b++) sum[t][b] = (Vector){0};
        for (int64_t w = 0; w < words; w++, codes += LANES, x += in) {
            Words word[tiles];
            UNROLL for (int t = 0; t < tiles; t++) {
                word[t] = *(const Words *)(codes + t * length);
                __builtin_prefetch((const char *)(codes + t * length) + AHEAD);
            }
            for (int64_t k = 0; k < in; k++) UNROLL for (int t = 0; t < tiles; t++) {
                Vector level = levels_of(word[t] & mask, q->levels, table);
                word[t] >>= bits;
                UNROLL for (int b = 0; b < batch; b++) sum[t][b] += level * x[b * width + k];
            }
        }
        UNROLL for (int t = 0; t < tiles; t++) UNROLL for (int b = 0; b < batch; b++)
            total[t][b] += *(const Vector *)(scales + t * groups * LANES) * (sum[t][b] - (table < 0 ? sums[b * groups + g] : 0));
    }
    UNROLL for (int t = 0; t < tiles; t++) UNROLL for (int b = 0; b < batch; b++)
        *(Vector *)(y + (b * tiles + t) * LANES) = total[t][b];
}

typedef void Tile(const Codes *, int64_t, const float *, int64_t, const float *, float *);
#define TILE(name, tiles, batch, table)                                                                                      \
    static void name(const Codes *q, int64_t first, const float *x, int64_t width, const float *sums, float *y) {            \
        tile(tiles, batch, table, q, first, x, width, sums, y);                                                              \
    }
#define TILES(name, table)                                                                                                   \
    TILE(name##_4_1, 4, 1, table) TILE(name##_4_2, 4, 2, table) TILE(name##_2_4, 2, 4, table) TILE(name##_1_8, 1, 8, table)  \
    TILE(name##_1_1, 1, 1, table) TILE(name##_1_2, 1, 2, table) TILE(name##_1_4, 1, 4, table)                                \
    static Tile *const name[2][4] = {{name##_4_1, name##_4_2, name##_2_4, name##_1_8},                                       \
                                     {name##_1_1, name##_1_2, name##_1_4, name##_1_8}};
TILES(even, -1) TILES(table_16, 0) TILES(table_32, 1) TILES(table_64, 2) TILES(table_128, 3) TILES(table_256, 4)
static Tile *const (*const TABLES[])[4] = {even, table_16, table_32, table_64, table_128, table_256};
/* More tiles at once the fewer rows there are, so that enough sums are under way. */
static const int SIDE_BY_SIDE[4] = {4, 4, 2, 1};
INLINE int size_of(int64_t batch) { return batch > 4 ? 3 : batch > 2 ? 2 : batch > 1; }

/* x <- H (signs x), H orthonormal, block by block: sums and differences of numbers 1, 2, 4, ... apart. */
static void rotate(float *x, int64_t in, const float *signs, int64_t block) {
    float scale = 1;
    for (int64_t n = block; n > 1; n /= 2) scale *= 0.70710678118654752f;
    for (int64_t i = 0; i < in; i++) x[i] *= signs[i] * scale;
    int64_t apart = 1;
#if LANES == 16 && defined(PICK)
    if (block >= LANES) { /* the first four within vectors */
        const Vector one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
        const Vector two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
        const Vector four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
        const Vector eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
        for (int64_t i = 0; i < in; i += LANES) {
            Vector v = *(Vector *)(x + i);
            v = PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + v * one;
            v = PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + v * two;
            v = PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + v * four;
            *(Vector *)(x + i) = PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + v * eight;
        }
        apart = LANES;
    }
#endif
    for (; apart < block; apart *= 2)
        for (int64_t from = 0; from < in; from += 2 * apart)
            for (int64_t i = from; i < from + apart; i++) {
                float a = x[i], b = x[i + apart];
                x[i] = a + b;
                x[i + apart] = a - b;
            }
}

int gramian_lanes(void) { return LANES; }

INLINE int table_of(const Codes *q) { return !q->levels ? -1 : q->bits <= 4 ? 0 : q->bits - 4; }

/* Row b of x S^T, in float32. */
static void rotated(const Codes *q, const void *x, int64_t b, float *row) {
    for (int64_t i = 0; i < q->in; i++) row[i] = one(x, b * q->in + i, q->half);
    for (int64_t k = 0; k < q->rounds; k++) rotate(row, q->in, q->signs + k * q->in, q->rotation);
}

/* x S^T: x (batch, in) -> y (batch, in). Returns 1 without memory. */
int gramian_rotate(const Codes *q, int batch, const void *x, void *y, int threads) {
    float *apart = malloc((threads * q->in + 1) * sizeof(float));
    if (!apart) return 1;
    PARALLEL(threads) {
        float *row = apart + this_thread() * q->in;
        for (int64_t b = share(batch, this_thread()); b < share(batch, this_thread() + 1); b++) {
            rotated(q, x, b, row);
            for (int64_t i = 0; i < q->in; i++) put(y, b * q->in + i, row[i], q->half);
        }
    }
    free(apart);
    return 0;
}

/* Tile t of Q as numbers, in the first LANES columns of weights (in, width). */
INLINE void decode(const int table, const int half, const Codes *q, int64_t t, int64_t width, void *weights) {
    int64_t in = in_word(q), words = group_words(q), groups = group_count(q);
    uint32_t mask = (1u << q->bits) - 1;
    float middle = table < 0 ? mask / 2.0f : 0;
    for (int64_t g = 0; g < groups; g++) {
        const uint32_t *codes = q->codes + (t * groups + g) * words * LANES;
        Vector scale = *(const Vector *)(q->scales + (t * groups + g) * LANES);
        int64_t i = g * q->group, end = i + q->group < q->in ? i + q->group : q->in;
        for (; i < end; codes += LANES) {
            Words word = *(const Words *)codes;
            for (int64_t k = 0; k < in && i < end; k++, i++, word >>= q->bits)
                put_many(weights, i * width, (levels_of(word & mask, q->levels, table) - middle) * scale, half);
        }
    }
}

#define DECODE(name, table)                                                                                                  \
    static void name##_full(const Codes *q, int64_t t, int64_t width, void *weights) { decode(table, 0, q, t, width, weights); } \
    static void name##_half(const Codes *q, int64_t t, int64_t width, void *weights) { decode(table, 1, q, t, width, weights); }
DECODE(numbers, -1) DECODE(of_16, 0) DECODE(of_32, 1) DECODE(of_64, 2) DECODE(of_128, 3) DECODE(of_256, 4)
typedef void Decode(const Codes *, int64_t, int64_t, void *);
static Decode *const DECODES[][2] = {{numbers_full, numbers_half}, {of_16_full, of_16_half},   {of_32_full, of_32_half},
                                     {of_64_full, of_64_half},     {of_128_full, of_128_half}, {of_256_full, of_256_half}};

/* `count` tiles of Q from the `first`-th as numbers, float32 or bfloat16 (half), turned: weights (in, count * LANES). */
void gramian_decode(const Codes *q, int64_t first, int64_t count, void *weights, int threads) {
    Decode *tile = DECODES[1 + table_of(q)][q->half];
    PARALLEL(threads) {
        for (int64_t t = share(count, this_thread()); t < share(count, this_thread() + 1); t++)
            tile(q, first + t, count * LANES, (char *)weights + t * LANES * (q->half ? 2 : 4));
    }
}

/* x (batch, in) -> y (batch, out), both float32 or bfloat16 (half). Returns 1 without memory. */
int gramian_codes(const Codes *q, int batch, const void *x, void *y, int threads) {
    int64_t words = group_words(q), groups = group_count(q), span = words * in_word(q), width = groups * span;
    int64_t tiles = (q->out + LANES - 1) / LANES, rows = (batch + MOST - 1) / MOST * MOST;
    float *apart = calloc(rows * (width + groups) + q->in, sizeof(float));
    if (!apart) return 1;
    float *sums = apart + rows * width, *row = sums + rows * groups, middle = ((1 << q->bits) - 1) / 2.0f;
    for (int64_t b = 0; b < batch; b++) {
        rotated(q, x, b, row);
        for (int64_t g = 0; g < groups; g++) {
            const float *from = row + g * q->group;
            int64_t count = q->in - g * q->group < q->group ? q->in - g * q->group : q->group;
            float sum = 0;
            for (int64_t i = 0; i < count; i++) sum += from[i];
            sums[b * groups + g] = middle * sum;
            memcpy(apart + b * width + g * span, from, count * sizeof(float));
        }
    }
    threads = worth(threads, q->out * q->in * batch);
    Tile *const (*kind)[4] = TABLES[1 + table_of(q)];
    PARALLEL(threads) {
        int64_t lo = share(tiles, this_thread()), hi = share(tiles, this_thread() + 1);
        int most = SIDE_BY_SIDE[size_of(batch)]; /* for all rows, those left over at the end too */
        for (int64_t t = lo, wide; t < hi; t += wide) {
            wide = t + most <= hi ? most : 1;
            for (int64_t done = 0, size; done < batch; done += 1 << size) {
                float made[MOST * LANES];
                int64_t left = batch - done;
                size = size_of(left);
                kind[wide != SIDE_BY_SIDE[size]][size](q, t, apart + done * width, width, sums + done * groups, made);
                for (int64_t b = 0; b < left && b < 1 << size; b++)
                    for (int64_t i = 0; i < wide * LANES && t * LANES + i < q->out; i++)
                        put(y, (done + b) * q->out + t * LANES + i, made[b * wide * LANES + i], q->half);
            }
        }
    }
    free(apart);
    return 0;
}
