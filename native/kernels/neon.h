// What the NEON instruction sets share.

#pragma once

#include "tile.h"

#include <arm_neon.h>

namespace omnivlm {
namespace {

struct VectorNeon {
    using Vector               = int32x4_t;
    using Operand              = int8x16_t;
    static constexpr int BYTES = 16;

    static int32x4_t zero() { return vdupq_n_s32(0); }
    static int8x16_t load(const char * p) { return vld1q_s8(reinterpret_cast<const int8_t *>(p)); }
    static void      store(char * p, int32x4_t v) { vst1q_s32(reinterpret_cast<int32_t *>(p), v); }

    static int8x16_t broadcast(const char * p) {
        int32_t word;
        __builtin_memcpy(&word, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(word));
    }

    static int32x4_t multiply_add(int32x4_t acc, uint32x4_t a, uint32x4_t b) {
        return vreinterpretq_s32_f32(
            vfmaq_f32(vreinterpretq_f32_s32(acc), vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b)));
    }
};

// The dot product of ARMv8.2, which the later instruction sets have, too.
struct DotProduct : VectorNeon {
    static constexpr int KP = 4, OPS = 32;

    static int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) { return vdotq_s32(acc, a, b); }

    // For blockwise.h and cached-attention.h.
    static constexpr bool SIGNED_WEIGHTS = true;

    static int8x16_t lookup(const uint8_t * codebook) { return vreinterpretq_s8_u8(vld1q_u8(codebook)); }

    static void unpack(int8x16_t bytes, int8x16_t codebook, int8x16_t & lower, int8x16_t & upper) {
        const uint8x16_t halves = vreinterpretq_u8_s8(bytes);
        lower                   = vqtbl1q_s8(codebook, vandq_u8(halves, vdupq_n_u8(15)));
        upper                   = vqtbl1q_s8(codebook, vshrq_n_u8(halves, 4));
    }

    static int32x4_t load_halves(const char * p) {
        const float16x4_t halves = vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)));
        return vreinterpretq_s32_f32(vcvt_f32_f16(halves));
    }

    static int32x4_t load_sums(const char * p) { return vld1q_s32(reinterpret_cast<const int32_t *>(p)); }
    static int32x4_t splat(int32_t value) { return vdupq_n_s32(value); }

    static int32x4_t add_scaled(int32x4_t sum, int32x4_t dots, int32x4_t scale, float factor) {
        const float32x4_t product = vmulq_n_f32(vreinterpretq_f32_s32(scale), factor);
        return vreinterpretq_s32_f32(vfmaq_f32(vreinterpretq_f32_s32(sum), vcvtq_f32_s32(dots), product));
    }

    static int32x4_t subtract_scaled(int32x4_t sum, int32x4_t minimum, float factor) {
        const float32x4_t product = vreinterpretq_f32_s32(minimum);
        return vreinterpretq_s32_f32(vfmsq_f32(vreinterpretq_f32_s32(sum), product, vdupq_n_f32(factor)));
    }
};

// A BF16 is the upper half of an F32.
struct Bf16 : VectorNeon {
    static constexpr int KP = 2, OPS = 16;

    static int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) {
        const uint32x4_t x     = vreinterpretq_u32_s8(a);
        const uint32x4_t y     = vreinterpretq_u32_s8(b);
        const uint32x4_t upper = vdupq_n_u32(0xffff0000U);
        acc                    = multiply_add(acc, vshlq_n_u32(x, 16), vshlq_n_u32(y, 16));
        return multiply_add(acc, vandq_u32(x, upper), vandq_u32(y, upper));
    }
};

struct F32 : VectorNeon {
    static constexpr int KP = 1, OPS = 8;

    static int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) {
        return multiply_add(acc, vreinterpretq_u32_s8(a), vreinterpretq_u32_s8(b));
    }
};

}  // namespace
}  // namespace omnivlm
