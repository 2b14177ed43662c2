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
