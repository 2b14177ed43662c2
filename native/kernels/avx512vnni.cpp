// x86-64 with AVX-512 VNNI and BF16 (Zen 4 and later, Cooper Lake, Sapphire Rapids).

#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "tile.h"
#include "vector512.h"

namespace omnivlm {
namespace {

struct Int8 : Vector512 {
    static constexpr int KP = 4, OPS = 128;

    static __m512i dot(__m512i acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

struct Bf16 : Vector512 {
    static constexpr int KP = 2, OPS = 64;

    static __m512i dot(__m512i acc, __m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), (__m512bh)a, (__m512bh)b));
    }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 255.0F;
    static constexpr unsigned INT8_ROW_BIAS = 0;

    static constexpr MicroKernel int8() { return micro_kernel<Int8, 9, 3>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 9, 3>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 9, 3>(); }
};

}  // namespace

constexpr Kernels AVX512_VNNI = Loops<Isa>::table("avx512-vnni", has_avx512_vnni);

}  // namespace omnivlm
