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
    // Several pictures share a graph where ggml computes. With kernels each has a part of the threads to itself, which
    // wait for each other less then; in low memory they come one after the other.
    // Safe to call from several threads; calls run one after the other. Throws DeviceError.
    void encode(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector = nullptr);

    // Seconds that each kind of node takes for one picture [3, image_size, image_size], by name.
    std::map<std::string, double> profile(const float * pixels);

    const VisionHparams & hparams() const { return model_.hparams; }

    const char * precision() const;  // never "auto"
    const char * kernels() const;    // the instruction set; empty where ggml computes

  private:
    // A graph, its memory, and the threads that compute it.
    struct Lane {
        int              n_threads = 1;
        ggml_backend_ptr backend;
        ggml_gallocr_ptr allocator;
        VisionGraph      graph;
        int64_t          n_images = 0;  // that the graph was built for
    };

    Lane        new_lane(int n_threads) const;
    void        prepare(Lane & lane, int64_t n_images, bool with_kernels) const;
    void        copy_vectors();
    VisionGraph build(const Lane & lane, int64_t n_images, bool with_kernels) const;
    void        encode_batch(Lane & lane, const float * pixels, int64_t n_images, float * tokens,
                             ImportanceCollector * collector) const;
    void        encode_side_by_side(const float * pixels, int64_t n_images, float * tokens) const;
    void        compute(const Lane & lane, ggml_cgraph * graph) const;
    // The graph in parts that end with each node that is `wanted`, which `computed` is then told.
    void compute_in_parts(const Lane & lane, const std::function<bool(const ggml_tensor *)> & wanted,
                          const std::function<void(const ggml_tensor *)> & computed) const;
    // How many of the next `n_left` pictures are computed together.
    int64_t n_together(int64_t n_left, bool collects) const;

    Options         options_;
    Precision       precision_ = Precision::GGML;
    const Kernels * kernels_   = nullptr;  // null where ggml computes
    VisionModel     model_;
    AlignedMemory   vectors_;
    PackedWeights   packed_;
    Lane            lane_;  // with all threads
    std::mutex      mutex_;
};

}  // namespace omnivlm
