// GGUF mmproj file -> hyper-parameters + weights. Every key, tensor, type and shape that the graph
// relies on is checked here, against each other and against the file's size.
//
// Two layouts are read (MODEL.md lists both in full):
//   siglip   the published OmniVLM-968M files: no eps key, no variant key, ffn names swapped
//   clip     our own, after llama.cpp's clip conventions, clip.projector_type = omnivlm

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "mapped-file.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace omnivlm {

struct VisionHparams {
    int64_t image_size  = 0;  // pixels, square
    int64_t patch_size  = 0;  // pixels, square
    int64_t n_embd      = 0;  // width of the tower
    int64_t n_ff        = 0;  // inner width of a block's MLP
    int64_t n_layer     = 0;
    int64_t n_head      = 0;
    int64_t n_merge     = 0;  // consecutive patches joined into one token
    int64_t n_proj      = 0;  // inner width of the projector
    int64_t n_embd_text = 0;  // width of the text model = of one image token
    float   eps         = 0.0F;

    std::array<float, 3> image_mean{};
    std::array<float, 3> image_std{};

    bool        projector_gelu_erf = true;  // exact GELU; false: tanh approximation
    std::string prompt_variant;             // empty when the file names none
    bool        single_turn = false;        // trained on conversations of one question only

    int64_t patches_per_side() const { return image_size / patch_size; }  // valid convolution: the rest is unused
    int64_t n_patches() const { return patches_per_side() * patches_per_side(); }
    int64_t n_tokens() const { return n_patches() / n_merge; }
    int64_t n_pixels() const { return 3 * image_size * image_size; }  // values of a picture
};

struct Linear {
    ggml_tensor * weight = nullptr;  // [n_in, n_out]
    ggml_tensor * bias   = nullptr;  // [n_out]
};

struct LayerNorm {
    ggml_tensor * weight = nullptr;  // [n]
    ggml_tensor * bias   = nullptr;  // [n]
};

struct VisionBlock {
    LayerNorm ln1;
    Linear    q, k, v, out;
    LayerNorm ln2;
    Linear    fc1;  // [n_embd, n_ff]
    Linear    fc2;  // [n_ff, n_embd]
};

struct VisionModel {
    VisionHparams hparams;

    Linear                   patch_embd;     // weight [patch, patch, 3, n_embd]
    ggml_tensor *            position_embd;  // [n_embd, n_patches]
    std::vector<VisionBlock> blocks;
    LayerNorm                post_ln;
    Linear                   projector_in;   // [n_embd*n_merge, n_proj]
    Linear                   projector_out;  // [n_proj, n_embd_text]

    // Owners of the memory behind the tensors. On a device that can use host memory the weights
    // stay in the file's mapping; elsewhere the buffer holds the only copy and `file` is empty.
    MappedFile              file;
    ggml_context_ptr        context;
    ggml_backend_buffer_ptr buffer;
};

// Reads the file and places its weights on `device`.
// Throws ModelFileError naming the key or tensor at fault, DeviceError when memory runs out.
VisionModel load_vision_model(const std::string & path, ggml_backend_dev_t device);

}  // namespace omnivlm
