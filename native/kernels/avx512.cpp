// x86-64 with AVX-512 but without its dot products (Skylake-X).

#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "tile.h"
#include "vector512.h"

namespace omnivlm {
namespace {

// 7-bit activations: two products of at most 127 * 127 fit into 16 bits.
struct Int8 : Vector512 {
    static constexpr int KP = 4, OPS = 128;

    static __m512i dot(__m512i acc, __m512i a, __m512i b) {
        return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
    }
};

// A BF16 is the upper half of an F32.
struct Bf16 : Vector512 {
    static constexpr int KP = 2, OPS = 64;

    static __m512i dot(__m512i acc, __m512i a, __m512i b) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
        acc                 = multiply_add(acc, _mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16));
        return multiply_add(acc, _mm512_and_si512(a, upper), _mm512_and_si512(b, upper));
    }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 127.0F;
    static constexpr unsigned INT8_ROW_BIAS = 0;

    static constexpr MicroKernel int8() { return micro_kernel<Int8, 8, 3>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 6, 3>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 9, 3>(); }
};

}  // namespace

constexpr Kernels AVX512 = Loops<Isa>::table("avx512", has_avx512);

}  // namespace omnivlm
