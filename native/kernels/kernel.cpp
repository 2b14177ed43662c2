#include "kernel.h"

#include "instruction-sets.h"

#include <algorithm>

namespace omnivlm {
namespace {

constexpr int64_t MAX_BLOCK = 1 << 16;  // 255 * 127 * MAX_BLOCK fits into 32 bits
constexpr size_t  ALIGNMENT = 64;       // a cache line and the widest vector

size_t aligned(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

}  // namespace

size_t Packing::row_values_bytes() const {
    return aligned(static_cast<size_t>(n_padded() * value_bytes()));
}

size_t Packing::row_bytes() const {
    const auto scales = operand == Operand::INT8 ? 2 * sizeof(float) * static_cast<size_t>(n_blocks) : 0;
    return aligned(row_values_bytes() + scales);
}

size_t Packing::panel_values_bytes() const {
    return static_cast<size_t>(n_padded() * value_bytes() * nr);
}

size_t Packing::panel_bytes() const {
    const auto scales = operand == Operand::INT8 ? 2 * sizeof(float) * static_cast<size_t>(n_blocks * nr) : 0;
    return aligned(panel_values_bytes() + scales);
}

size_t Packing::panel_scratch_bytes() const {
    return static_cast<size_t>(nr) * row_values_bytes();
}

Packing Kernels::packing(Operand operand, int64_t n_in, int64_t block) const {
    const MicroKernel & kernel   = micro[static_cast<int>(operand)];
    const int64_t       n_steps  = (n_in + kernel.kp - 1) / kernel.kp;
    int64_t             n_blocks = 1;
    if (operand == Operand::INT8) {
        n_blocks = block > 0 ? std::max<int64_t>(1, (n_in + block / 2) / block) : 1;
        n_blocks = std::max(n_blocks, (n_in + MAX_BLOCK - 1) / MAX_BLOCK);
    }
    const int64_t steps_per_block = (n_steps + n_blocks - 1) / n_blocks;
    return { operand, kernel.mr, kernel.nr, kernel.kp, n_in, steps_per_block * kernel.kp, n_blocks };
}

const std::vector<const Kernels *> & all_kernels() {
    static const std::vector<const Kernels *> all = {
#ifdef OMNIVLM_HAS_avx512vnni
        &AVX512_VNNI,
#endif
#ifdef OMNIVLM_HAS_avx512
        &AVX512,
#endif
#ifdef OMNIVLM_HAS_avxvnni
        &AVX_VNNI,
#endif
#ifdef OMNIVLM_HAS_avx2
        &AVX2,
#endif
#ifdef OMNIVLM_HAS_neon_i8mm
        &NEON_I8MM,
#endif
#ifdef OMNIVLM_HAS_neon_dotprod
        &NEON_DOTPROD,
#endif
        &PORTABLE,
    };
    return all;
}

const Kernels & best_kernels() {
    const auto & all = all_kernels();
    return **std::find_if(all.begin(), all.end(), [](const Kernels * kernels) { return kernels->supported(); });
}

}  // namespace omnivlm
