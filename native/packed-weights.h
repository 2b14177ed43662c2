// A model's matrices, dequantised and packed into the panels that the kernels multiply with.

#pragma once

#include "kernels/kernel.h"
#include "vision-model.h"

#include <cstdlib>
#include <memory>
#include <unordered_map>

namespace omnivlm {

struct FreeAligned {
    void operator()(char * p) const { std::free(p); }
};

using AlignedMemory = std::unique_ptr<char[], FreeAligned>;

// 64-byte aligned, not initialised. Throws std::bad_alloc.
AlignedMemory allocate_aligned(size_t bytes);

// How a matrix [n_in, n_out] is packed.
struct PackedShape {
    Packing packing;
    int64_t n_out = 0;

    int64_t n_panels() const { return (n_out + packing.nr - 1) / packing.nr; }

    size_t bytes() const { return static_cast<size_t>(n_panels()) * packing.panel_bytes(); }

    // What write_panel needs.
    size_t scratch_bytes() const;
};

// Packs one panel of a weight of any type that ggml reads, through ggml's own dequantisation.
void write_panel(const Kernels & kernels, const PackedShape & shape, const ggml_tensor * weight, int64_t panel,
                 char * scratch, char * panels);

// All matrices packed, in one block of memory.
class PackedWeights {
  public:
    struct Source {
        const ggml_tensor * weight;
        PackedShape         shape;
    };

    PackedWeights() = default;

    // Packs with `n_threads` threads. The pages of `file` that were read are given back. Throws std::bad_alloc.
    PackedWeights(const Kernels & kernels, const std::vector<Source> & sources, const MappedFile & file, int n_threads);

    // Null where there are none.
    const char * panels_of(const ggml_tensor * weight) const;

  private:
    AlignedMemory                                         memory_;
    std::unordered_map<const ggml_tensor *, const char *> panels_;
};

}  // namespace omnivlm
