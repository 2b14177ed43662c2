// Owns a vision model on one device and runs it: pixels in, image tokens out.

#pragma once

#include "importance.h"
#include "packed-weights.h"
#include "vision-graph.h"
#include "vision-kernels.h"
#include "vision-model.h"

#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace omnivlm {

class VisionEncoder {
  public:
    struct Options {
        std::string device;  // a name from ggml's backend registry
        int         n_threads = 1;
        // "auto", "int8", "int8-fast", "int8-block32", "bf16" or "f32" for the kernels, which are the CPU's alone, or
        // "ggml". "auto" is "int8" where the machine has instructions for it, else "ggml".
        std::string precision = "auto";
        std::string kernels;  // an instruction set; the quickest here if empty
        // Weights stay in the file's mapping and are packed layer by layer, for each batch anew.
        bool low_memory = false;
        // Where ggml computes: used if the device has it for this model's head size.
        bool flash_attention = true;
    };

    // Throws ModelFileError, DeviceError, and std::invalid_argument for names that do not exist.
    VisionEncoder(const std::string & path, const Options & options);

    // pixels: float32 [n_images, 3, image_size, image_size], normalised; row-major
    // tokens: float32 [n_images, n_tokens, n_embd_text], written
    // A `collector`, if any, is shown every matrix product.
    // Safe to call from several threads; calls run one after the other. Throws DeviceError.
    void encode(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector = nullptr);

    // Seconds that each kind of node takes for one picture [3, image_size, image_size], by name.
    std::map<std::string, double> profile(const float * pixels);

    const VisionHparams & hparams() const { return model_.hparams; }

    const char * precision() const;  // never "auto"
    const char * kernels() const;    // the instruction set; empty where ggml computes

  private:
    void        prepare(int64_t n_images, bool with_kernels);
    void        copy_vectors();
    void        load_pixels(const float * pixels);
    VisionGraph build(int64_t n_images, bool with_kernels) const;
    void        encode_batch(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector);
    void        compute(ggml_cgraph * graph);
    // The graph in parts that end with each node that is `wanted`, which `computed` is then told.
    void compute_in_parts(const std::function<bool(const ggml_tensor *)> & wanted,
                          const std::function<void(const ggml_tensor *)> & computed);

    Options          options_;
    Precision        precision_ = Precision::GGML;
    const Kernels *  kernels_   = nullptr;  // null where ggml computes
    ggml_backend_ptr backend_;
    VisionModel      model_;
    AlignedMemory    vectors_;
    PackedWeights    packed_;
    ggml_gallocr_ptr allocator_;
    VisionGraph      graph_;
    int64_t          graph_images_ = 0;  // batch size that graph_ was built for
    std::mutex       mutex_;
};

}  // namespace omnivlm
