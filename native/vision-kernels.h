// The kernels as nodes of a ggml graph: ggml keeps the order, the memory and the threads.

#pragma once

#include "kernels/kernel.h"
#include "packed-weights.h"
#include "vision-model.h"

#include <atomic>
#include <deque>
#include <string>
#include <vector>

namespace omnivlm {

// How the matrix products of the tower are computed on a CPU.
enum class Precision {
    GGML,          // by ggml, in the types of the file
    INT8,          // 8 bits, a scale for each 576 values or so, in the projector for each 32; patches in BF16
    INT8_FAST,     // 8 bits, one scale a row; the projector too
    INT8_BLOCK32,  // 8 bits, a scale for each 32 values or so, as Q8_0
    BF16,
    F32,
};

// "ggml", "int8", "int8-fast", "int8-block32", "bf16" or "f32". Throws std::invalid_argument for any other name.
Precision    precision_named(const std::string & name);
const char * name_of(Precision precision);

// The same on the CPU, where "auto" is "int8" if there are instructions for it, else "ggml".
Precision precision_on_cpu(const std::string & name, const Kernels & kernels);

enum class Part { PATCHES, TOWER, PROJECTOR };

// The layout of operands for the products of one part of the model.
Packing packing_of(const Kernels & kernels, Precision precision, Part part, int64_t n_in);

// Activations as the kernels take them.
struct Rows {
    ggml_tensor * tensor;  // I8 [row_bytes, n_rows padded to whole tiles]
    Packing       packing;
    int64_t       n_rows;
};

// Makes the nodes of one graph and holds what they need while they are computed.
class KernelNodes {
  public:
    // Matrices that are not in `weights` are packed anew each time the graph is computed.
    KernelNodes(const Kernels & kernels, Precision precision, const PackedWeights & weights, const MappedFile & file,
                int n_threads);

    // x [n_in, ...] F32, normalised first if `norm` is not null
    Rows rows(ggml_context * ctx, ggml_tensor * x, const LayerNorm * norm, float eps, Part part);

    // -> [n_out, n_rows] F32; `residual` of the same shape for Epilogue::RESIDUAL, else null
    ggml_tensor * linear(ggml_context * ctx, const Linear & layer, const Rows & rows, Epilogue epilogue,
                         ggml_tensor * residual);

    // q, k, v [d, n_tokens * n_images] F32 -> [d, n_tokens * n_images]
    ggml_tensor * attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, int64_t n_tokens,
                            int64_t n_head);

    KernelNodes(const KernelNodes &)             = delete;  // nodes know its address
    KernelNodes & operator=(const KernelNodes &) = delete;

    // Before each computation of the graph.
    void reset();

  private:
    struct Node {
        const KernelNodes *  nodes = nullptr;
        std::atomic<int64_t> next{ 0 };  // unit of work that no thread has taken yet

        Packing packing{};
        int64_t n_rows = 0;

        NormWeights norm{};  // of rows
        bool        normalise = false;

        const ggml_tensor * weight = nullptr;  // of linear
        const float *       bias   = nullptr;
        const char *        panels = nullptr;  // null: in the node's second source
        Epilogue            epilogue{};
        int64_t             n_out = 0;

        int64_t n_tokens = 0;  // of attention
        int64_t n_head   = 0;

        char * scratch(int thread) const { return nodes->scratch_[static_cast<size_t>(thread)].get(); }
    };

    template <void (*COMPUTE)(Node & node, ggml_tensor * dst, int thread, int n_threads)>
    ggml_tensor * custom(ggml_context * ctx, Node & node, const std::string & name, ggml_type type, int64_t ne0,
                         int64_t ne1, std::vector<ggml_tensor *> sources);

    static void compute_rows(Node & node, ggml_tensor * dst, int thread, int n_threads);
    static void compute_panels(Node & node, ggml_tensor * dst, int thread, int n_threads);
    static void compute_linear(Node & node, ggml_tensor * dst, int thread, int n_threads);
    static void compute_attention(Node & node, ggml_tensor * dst, int thread, int n_threads);

    static AttentionTask attention_task(const Node & node, const ggml_tensor * dst);

    Node & new_node();
    void   need_scratch(size_t bytes);

    const Kernels &            kernels_;
    Precision                  precision_;
    const PackedWeights &      weights_;
    const MappedFile &         file_;
    size_t                     scratch_bytes_ = 0;
    std::vector<AlignedMemory> scratch_;  // by thread
    std::deque<Node>           nodes_;    // addresses stay
};

}  // namespace omnivlm
