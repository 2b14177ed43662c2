// The vision path as a ggml graph: pixels -> patches -> transformer -> token merge -> projector.

#pragma once

#include "vision-kernels.h"
#include "vision-model.h"

#include <memory>

namespace omnivlm {

struct VisionGraph {
    ggml_context_ptr context;
    ggml_cgraph *    graph  = nullptr;
    ggml_tensor *    pixels = nullptr;  // input  [image_size, image_size, 3, n_images] F32
    ggml_tensor *    tokens = nullptr;  // output [n_embd_text, n_tokens, n_images] F32

    std::unique_ptr<KernelNodes> kernels;  // null where ggml computes all
};

enum class Attention { FLASH, EXPLICIT };

// Builds the graph for a batch of `n_images`; no memory for tensor data is allocated. With `kernels`, `attention`
// does not matter.
VisionGraph build_vision_graph(const VisionModel & model, int64_t n_images, Attention attention,
                               std::unique_ptr<KernelNodes> kernels);

}  // namespace omnivlm
