/* Vectors, threads, and the two kinds of numbers. Plain C with the extensions of GCC and Clang, for the processor that it is
   compiled on. */

#ifndef GRAMIAN_NUMBERS_H
#define GRAMIAN_NUMBERS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define PICK __builtin_shufflevector
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#ifdef _OPENMP
#include <omp.h>
#define PARALLEL(threads) _Pragma("omp parallel num_threads(threads) if (threads > 1)")
#define BARRIER _Pragma("omp barrier")
INLINE int this_thread(void) { return omp_get_thread_num(); }
INLINE int all_threads(void) { return omp_get_num_threads(); }
#else
#define PARALLEL(threads) (void)(threads);
#define BARRIER
INLINE int this_thread(void) { return 0; }
INLINE int all_threads(void) { return 1; }
#endif

/* Where the share of a thread begins, of so many things in order; the next one's begins where it ends. */
INLINE int64_t share(int64_t count, int thread) { return count * thread / all_threads(); }

#define SMALL 8192 /* multiplications that a second thread is worth */
INLINE int worth(int threads, int64_t multiplications) {
    return threads > 1 + multiplications / SMALL ? 1 + multiplications / SMALL : threads;
}

/* Number `at` of an array of float32, or bfloat16 (half). */
INLINE float one(const void *values, int64_t at, int half) {
    if (!half) return ((const float *)values)[at];
    uint32_t word = (uint32_t)((const uint16_t *)values)[at] << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE Vector many(const void *values, int64_t at, int half) {
    if (!half) return *(const Vector *)((const float *)values + at);
    return (Vector)(__builtin_convertvector(*(const Halves *)((const uint16_t *)values + at), Words) << 16);
}

/* float32 to bfloat16: to the nearest, ties to even; what is no number stays none. */
INLINE uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return value == value ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : word >> 16 | 0x40;
}

INLINE void put(void *values, int64_t at, float value, int half) {
    if (half) ((uint16_t *)values)[at] = narrow(value);
    else ((float *)values)[at] = value;
}

/* The same for vectors, of finite numbers. */
INLINE void put_many(void *values, int64_t at, Vector v, int half) {
    if (half) *(Halves *)((uint16_t *)values + at) = __builtin_convertvector(((Words)v + 0x7fff + ((Words)v >> 16 & 1)) >> 16, Halves);
    else *(Vector *)((float *)values + at) = v;
}

#endif
