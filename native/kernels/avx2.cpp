// x86-64 with AVX2 and FMA (Haswell, Zen and later).

#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "tile.h"
#include "vector256.h"

namespace omnivlm {
namespace {

// 7-bit activations: two products of at most 127 * 127 fit into 16 bits.
struct Int8 : Vector256 {
    static constexpr int KP = 4, OPS = 64;

    static __m256i dot(__m256i acc, __m256i a, __m256i b) {
        return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
    }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 127.0F;
    static constexpr unsigned INT8_ROW_BIAS = 0;

    static constexpr MicroKernel int8() { return micro_kernel<Int8, 4, 2>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 4, 2>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 6, 2>(); }
};

}  // namespace

constexpr Kernels AVX2 = Loops<Isa>::table("avx2", has_avx2);

}  // namespace omnivlm
