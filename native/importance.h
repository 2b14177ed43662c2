// What an importance matrix is made of: sums over the activations that meet a model's weights.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace omnivlm {

// Over all rows of activations that one weight matrix multiplied.
struct ChannelSums {
    std::vector<double> values;   // [n_in]
    std::vector<double> squares;  // [n_in]
    int64_t             n_rows = 0;
};

// Looks at the nodes of a graph while it is computed. One thread at a time.
class ImportanceCollector {
  public:
    // Whether a node multiplies activations with a matrix that a file holds. Attention's own products do not.
    static bool wants(const ggml_tensor * node);

    // Adds the activations of a node that `wants` and that has just been computed, on whatever device.
    void add(const ggml_tensor * node);

    // A ggml_backend_sched_eval_callback; `collector` is an ImportanceCollector.
    static bool callback(ggml_tensor * node, bool ask, void * collector);

    // By the weights' names in their files.
    const std::map<std::string, ChannelSums> & sums() const { return sums_; }

  private:
    std::map<std::string, ChannelSums> sums_;
    std::vector<char>                  copy_;  // of what lies on a device
};

}  // namespace omnivlm
