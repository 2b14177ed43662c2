// What the two 512-bit instruction sets of x86-64 share.

#pragma once

#include "tile.h"

#include <immintrin.h>

namespace omnivlm {
namespace {

struct Vector512 {
    using Vector               = __m512i;
    using Operand              = __m512i;
    static constexpr int BYTES = 64;

    static __m512i zero() { return _mm512_setzero_si512(); }
    static __m512i load(const char * p) { return _mm512_loadu_si512(p); }
    static void    store(char * p, __m512i v) { _mm512_storeu_si512(p, v); }

    static __m512i broadcast(const char * p) {
        int32_t word;
        __builtin_memcpy(&word, p, 4);
        return _mm512_set1_epi32(word);
    }

    static __m512i multiply_add(__m512i acc, __m512i a, __m512i b) {
        return _mm512_castps_si512(
            _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(acc)));
    }
};

struct F32 : Vector512 {
    static constexpr int KP = 1, OPS = 32;

    static __m512i dot(__m512i acc, __m512i a, __m512i b) { return multiply_add(acc, a, b); }
};

}  // namespace
}  // namespace omnivlm
