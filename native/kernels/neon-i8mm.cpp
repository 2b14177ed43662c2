// arm64 with the 8-bit matrix products of ARMv8.6 (Apple M2, Neoverse V1, Cortex-X2 and later).

#include "blockwise.h"
#include "cached-attention.h"
#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "neon.h"
#include "tile.h"

namespace omnivlm {
namespace {

constexpr int MR = 8;
constexpr int NR = 16;

// smmla: 2 rows of 8 values times 2 columns of 8 values -> 2 x 2 sums.
OMNIVLM_LEAF void int8_tile(const char * rows, size_t row_bytes, const char * panel, int64_t n_steps, void * out) {
    // Four columns at a time leave room for 16 accumulators, 4 operands of the rows and 2 of the panel.
    for (int part = 0; part < 2; part++) {
        int32x4_t acc[MR / 2][NR / 4];
#pragma GCC unroll 16
        for (int r = 0; r < MR / 2; r++) {
#pragma GCC unroll 16
            for (int v = 0; v < NR / 4; v++) {
                acc[r][v] = vdupq_n_s32(0);
            }
        }
        const char * b = panel + part * (NR / 4) * 16;
        const char * a = rows;
        for (int64_t s = 0; s < n_steps; s++) {
            int8x16_t x[MR / 2];
#pragma GCC unroll 16
            for (int r = 0; r < MR / 2; r++) {
                const auto * even = reinterpret_cast<const int8_t *>(a + static_cast<size_t>(2 * r) * row_bytes);
                const auto * odd  = reinterpret_cast<const int8_t *>(a + static_cast<size_t>(2 * r + 1) * row_bytes);
                x[r]              = vcombine_s8(vld1_s8(even), vld1_s8(odd));
            }
#pragma GCC unroll 16
            for (int v = 0; v < NR / 4; v++) {
                const int8x16_t y = vld1q_s8(reinterpret_cast<const int8_t *>(b + v * 16));
#pragma GCC unroll 16
                for (int r = 0; r < MR / 2; r++) {
                    acc[r][v] = vmmlaq_s32(acc[r][v], x[r], y);
                }
            }
            a += 8;
            b += NR * 8;
        }
        auto * tile = static_cast<int32_t *>(out) + part * NR / 2;
#pragma GCC unroll 16
        for (int r = 0; r < MR / 2; r++) {
#pragma GCC unroll 16
            for (int v = 0; v < NR / 4; v++) {
                vst1_s32(tile + (2 * r) * NR + 2 * v, vget_low_s32(acc[r][v]));
                vst1_s32(tile + (2 * r + 1) * NR + 2 * v, vget_high_s32(acc[r][v]));
            }
        }
    }
}

struct Int8 : VectorNeon {  // for the peak only
    static constexpr int KP = 8, OPS = 64;

    static int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) { return vmmlaq_s32(acc, a, b); }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 255.0F;
    static constexpr unsigned INT8_ROW_BIAS = 128;  // the instruction multiplies signed values

    static constexpr MicroKernel int8() { return { MR, NR, Int8::KP, int8_tile, peak<Int8, 5, 4> }; }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 4, 4>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 5, 4>(); }
};

}  // namespace

constexpr Kernels NEON_I8MM =
    Loops<Isa>::table("neon-i8mm", has_neon_i8mm, Blockwise<DotProduct>::table(), CachedAttention<DotProduct>::table());

}  // namespace omnivlm
