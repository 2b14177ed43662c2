// x86-64 with 256-bit VNNI (Alder Lake and later, Zen 5).

#include "blockwise.h"
#include "cached-attention.h"
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

    // For blockwise.h and cached-attention.h.
    static constexpr bool SIGNED_WEIGHTS = false;

    static __m256i lookup(const uint8_t * codebook) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codebook)));
    }

    static void unpack(__m256i bytes, __m256i codebook, __m256i & lower, __m256i & upper) {
        const __m256i mask = _mm256_set1_epi8(15);
        lower              = _mm256_shuffle_epi8(codebook, _mm256_and_si256(bytes, mask));
        upper              = _mm256_shuffle_epi8(codebook, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
    }

    static __m256i load_halves(const char * p) {
        return _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
    }

    static __m256i load_sums(const char * p) { return load(p); }
    static __m256i splat(int32_t value) { return _mm256_set1_epi32(value); }

    static __m256i add_scaled(__m256i sum, __m256i dots, __m256i scale, float factor) {
        const __m256 product = _mm256_mul_ps(_mm256_castsi256_ps(scale), _mm256_set1_ps(factor));
        return _mm256_castps_si256(_mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), product, _mm256_castsi256_ps(sum)));
    }

    static __m256i subtract_scaled(__m256i sum, __m256i minimum, float factor) {
        return _mm256_castps_si256(
            _mm256_fnmadd_ps(_mm256_castsi256_ps(minimum), _mm256_set1_ps(factor), _mm256_castsi256_ps(sum)));
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

constexpr Kernels AVX_VNNI =
    Loops<Isa>::table("avx-vnni", SUPPORTED, Blockwise<Int8>::table(), CachedAttention<Int8>::table());

}  // namespace omnivlm
