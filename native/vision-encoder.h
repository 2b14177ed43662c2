// Owns a vision model on one device and runs it: pixels in, image tokens out.

#pragma once

#include "importance.h"
#include "vision-graph.h"
#include "vision-model.h"

#include <mutex>
#include <string>

namespace omnivlm {

class VisionEncoder {
  public:
    // `device` is a name from ggml's backend registry. `n_threads` matters to the CPU alone. Flash
    // attention is used where it is wanted and the device has it for this model's head size.
    // Throws ModelFileError, DeviceError.
    VisionEncoder(const std::string & path, const std::string & device, int n_threads, bool flash_attention);

    // pixels: float32 [n_images, 3, image_size, image_size], normalised; row-major
    // tokens: float32 [n_images, n_tokens, n_embd_text], written
    // A `collector`, if any, is shown every matrix product.
    // Safe to call from several threads; calls run one after the other. Throws DeviceError.
    void encode(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector = nullptr);

    const VisionHparams & hparams() const { return model_.hparams; }

  private:
    void prepare(int64_t n_images);
    void encode_batch(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector);
    void compute(ggml_cgraph * graph);
    void compute_in_parts(ImportanceCollector & collector);

    std::string      device_name_;
    bool             flash_attention_;
    ggml_backend_ptr backend_;
    VisionModel      model_;
    ggml_gallocr_ptr allocator_;
    VisionGraph      graph_;
    int64_t          graph_images_ = 0;  // batch size that graph_ was built for
    std::mutex       mutex_;
};

}  // namespace omnivlm
