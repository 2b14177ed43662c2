// What the two 256-bit instruction sets of x86-64 share. 16 registers: tiles of 4 by 2 and 6 by 2 vectors.

#pragma once

#include "tile.h"

#include <immintrin.h>

namespace omnivlm {
namespace {

struct Vector256 {
    using Vector               = __m256i;
    using Operand              = __m256i;
    static constexpr int BYTES = 32;

    static __m256i zero() { return _mm256_setzero_si256(); }
    static __m256i load(const char * p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static void    store(char * p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }

    static __m256i broadcast(const char * p) {
        int32_t word;
        __builtin_memcpy(&word, p, 4);
        return _mm256_set1_epi32(word);
    }

    static __m256i multiply_add(__m256i acc, __m256i a, __m256i b) {
        return _mm256_castps_si256(
            _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(acc)));
    }
};

// A BF16 is the upper half of an F32.
struct Bf16 : Vector256 {
    static constexpr int KP = 2, OPS = 32;

    static __m256i dot(__m256i acc, __m256i a, __m256i b) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
        acc                 = multiply_add(acc, _mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
        return multiply_add(acc, _mm256_and_si256(a, upper), _mm256_and_si256(b, upper));
    }
};

struct F32 : Vector256 {
    static constexpr int KP = 1, OPS = 16;

    static __m256i dot(__m256i acc, __m256i a, __m256i b) { return multiply_add(acc, a, b); }
};

}  // namespace
}  // namespace omnivlm
