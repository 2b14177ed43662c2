// arm64 with the dot products of ARMv8.2 (Cortex-A76 and later, Jetson Orin, Raspberry Pi 5, Apple M1).

#include "blockwise.h"
#include "cached-attention.h"
#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "neon.h"
#include "tile.h"

namespace omnivlm {
namespace {

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 255.0F;
    static constexpr unsigned INT8_ROW_BIAS = 128;  // the instruction multiplies signed values

    static constexpr MicroKernel int8() { return micro_kernel<DotProduct, 5, 4>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 4, 4>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 5, 4>(); }
};

}  // namespace

constexpr Kernels NEON_DOTPROD = Loops<Isa>::table("neon-dotprod", has_neon_dotprod, Blockwise<DotProduct>::table(),
                                                   CachedAttention<DotProduct>::table());

}  // namespace omnivlm
