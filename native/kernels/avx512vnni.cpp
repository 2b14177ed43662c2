// x86-64 with AVX-512 VNNI and BF16 (Zen 4 and later, Cooper Lake, Sapphire Rapids).

#include "blockwise.h"
#include "cached-attention.h"
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

    // For blockwise.h and cached-attention.h.
    static constexpr bool SIGNED_WEIGHTS = false;

    static __m512i lookup(const uint8_t * codebook) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codebook)));
    }

    static void unpack(__m512i bytes, __m512i codebook, __m512i & lower, __m512i & upper) {
        const __m512i mask = _mm512_set1_epi8(15);
        lower              = _mm512_shuffle_epi8(codebook, _mm512_and_si512(bytes, mask));
        upper              = _mm512_shuffle_epi8(codebook, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
    }

    static __m512i load_halves(const char * p) {
        return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
    }

    static __m512i load_sums(const char * p) { return load(p); }
    static __m512i splat(int32_t value) { return _mm512_set1_epi32(value); }

    static __m512i add_scaled(__m512i sum, __m512i dots, __m512i scale, float factor) {
        const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(scale), _mm512_set1_ps(factor));
        return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), product, _mm512_castsi512_ps(sum)));
    }

    static __m512i subtract_scaled(__m512i sum, __m512i minimum, float factor) {
        return _mm512_castps_si512(
            _mm512_fnmadd_ps(_mm512_castsi512_ps(minimum), _mm512_set1_ps(factor), _mm512_castsi512_ps(sum)));
    }
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

constexpr Kernels AVX512_VNNI =
    Loops<Isa>::table("avx512-vnni", has_avx512_vnni, Blockwise<Int8>::table(), CachedAttention<Int8>::table());

}  // namespace omnivlm
