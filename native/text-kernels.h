// The text model's products with weights of 4 or 8 bits, and its attention, by our kernels inside llama.cpp.

#pragma once

namespace omnivlm {

// From now on every model that llama.cpp loads to a CPU with `use_extra_bufts` keeps its matrices of 4 or 8
// bits as our kernels want them, and every one on a CPU attends with them. Call it once, before a model is loaded and
// while nothing computes. False, and nothing happens, where this machine has no such kernels, or ggml is not the one
// that this was built for.
bool install_text_kernels();

}  // namespace omnivlm
