// x86-64 with 256-bit VNNI (Alder Lake and later, Zen 5).

#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "tile.h"
#include "vector256.h"

namespace omnivlm {
namespace {

#ifdef __AVXVNNI__
constexpr auto SUPPORTED = has_avx_vnni;
#else  // the tests also compile this file for AVX-512's encoding of the same instruction
constexpr auto SUPPORTED = has_avx512_as_avx_vnni;
#endif

struct Int8 : Vector256 {
    static constexpr int KP = 4, OPS = 64;

    static __m256i dot(__m256i acc, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(acc, a, b);
#else
        return _mm256_dpbusd_epi32(acc, a, b);
#endif
    }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 255.0F;
    static constexpr unsigned INT8_ROW_BIAS = 0;

    static constexpr MicroKernel int8() { return micro_kernel<Int8, 6, 2>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 4, 2>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 6, 2>(); }
};

}  // namespace

constexpr Kernels AVX_VNNI = Loops<Isa>::table("avx-vnni", SUPPORTED);

}  // namespace omnivlm
