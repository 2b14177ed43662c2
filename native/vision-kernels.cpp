#include "vision-kernels.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>

namespace omnivlm {
namespace {

constexpr int64_t INT8_BLOCK     = 576;  // half of a row of the published tower
constexpr int64_t ROWS_AT_ONCE   = 8;
constexpr int64_t UNITS_A_THREAD = 12;  // enough that a thread which falls behind holds up little

struct NamedPrecision {
    const char * name;
    Precision    precision;
};

constexpr NamedPrecision PRECISIONS[] = {
    { "ggml", Precision::GGML },           { "int8", Precision::INT8 },
    { "int8-fast", Precision::INT8_FAST }, { "int8-block32", Precision::INT8_BLOCK32 },
    { "bf16", Precision::BF16 },           { "f32", Precision::F32 },
};

int64_t n_rows_of(const ggml_tensor * x) {
    return ggml_nelements(x) / x->ne[0];
}

Operand operand_of(Precision precision, Part part) {
    switch (precision) {
    case Precision::INT8:
    case Precision::INT8_FAST:
    case Precision::INT8_BLOCK32:
        return part == Part::PATCHES ? Operand::BF16 : Operand::INT8;  // patches are few and every error starts there
    case Precision::BF16:
        return Operand::BF16;
    default:
        return Operand::F32;
    }
}

// `v.blk.3.attn_q.weight` -> `attn_q`, `mm.0.weight` -> `mm.0`
std::string stage_of(const ggml_tensor * weight) {
    std::string       name = weight->name;
    const std::string end  = ".weight";
    name                   = name.substr(0, name.size() - end.size());
    return name.compare(0, 2, "v.") == 0 ? name.substr(name.rfind('.') + 1) : name;
}

}  // namespace

Precision precision_named(const std::string & name) {
    for (const NamedPrecision & named : PRECISIONS) {
        if (name == named.name) {
            return named.precision;
        }
    }
    throw std::invalid_argument("there is no precision '" + name + "'");
}

Precision precision_on_cpu(const std::string & name, const Kernels & kernels) {
    if (name == "auto") {
        return &kernels != all_kernels().back() ? Precision::INT8 : Precision::GGML;
    }
    return precision_named(name);
}

const char * name_of(Precision precision) {
    const auto is_named = [precision](const NamedPrecision & named) { return named.precision == precision; };
    return std::find_if(std::begin(PRECISIONS), std::end(PRECISIONS), is_named)->name;
}

Packing packing_of(const Kernels & kernels, Precision precision, Part part, int64_t n_in) {
    int64_t block = 0;  // one scale for all
    if (precision == Precision::INT8_BLOCK32 || (precision == Precision::INT8 && part == Part::PROJECTOR)) {
        block = 32;  // the projector's long rows lose more than the tower's, and cost little
    } else if (precision == Precision::INT8) {
        block = INT8_BLOCK;
    }
    return kernels.packing(operand_of(precision, part), n_in, block);
}

KernelNodes::KernelNodes(const Kernels & kernels, Precision precision, const PackedWeights & weights,
                         const MappedFile & file, int n_threads)
    : kernels_(kernels),
      precision_(precision),
      weights_(weights),
      file_(file),
      scratch_(static_cast<size_t>(n_threads)) {}

KernelNodes::Node & KernelNodes::new_node() {
    nodes_.emplace_back();
    nodes_.back().nodes = this;
    return nodes_.back();
}

void KernelNodes::need_scratch(size_t bytes) {
    if (bytes <= scratch_bytes_) {
        return;
    }
    scratch_bytes_ = bytes;
    for (AlignedMemory & memory : scratch_) {
        memory = allocate_aligned(bytes);
    }
}

void KernelNodes::reset() {
    for (Node & node : nodes_) {
        node.next = 0;
    }
}

template <void (*COMPUTE)(KernelNodes::Node & node, ggml_tensor * dst, int thread, int n_threads)>
ggml_tensor * KernelNodes::custom(ggml_context * ctx, Node & node, const std::string & name, ggml_type type,
                                  int64_t ne0, int64_t ne1, std::vector<ggml_tensor *> sources) {
    const auto compute = [](ggml_tensor * dst, int thread, int n_threads, void * data) {
        COMPUTE(*static_cast<Node *>(data), dst, thread, n_threads);
    };
    ggml_tensor * result = ggml_custom_4d(ctx, type, ne0, ne1, 1, 1, sources.data(), static_cast<int>(sources.size()),
                                          compute, GGML_N_TASKS_MAX, &node);
    return ggml_set_name(result, name.c_str());
}

// ---- rows of activations ------------------------------------------------------------------------

Rows KernelNodes::rows(ggml_context * ctx, ggml_tensor * x, const LayerNorm * norm, float eps, Part part) {
    Node & node  = new_node();
    node.packing = packing_of(kernels_, precision_, part, x->ne[0]);
    node.n_rows  = n_rows_of(x);
    if (norm != nullptr) {
        node.normalise = true;
        node.norm      = { static_cast<const float *>(norm->weight->data), static_cast<const float *>(norm->bias->data),
                           eps };
    }
    need_scratch(static_cast<size_t>(node.packing.n_padded()) * sizeof(float));
    const int64_t mr     = node.packing.mr;
    const int64_t padded = (node.n_rows + mr - 1) / mr * mr;
    ggml_tensor * tensor = custom<compute_rows>(ctx, node, norm != nullptr ? "norm and rows" : "rows", GGML_TYPE_I8,
                                                static_cast<int64_t>(node.packing.row_bytes()), padded, { x });
    return { tensor, node.packing, node.n_rows };
}

void KernelNodes::compute_rows(Node & node, ggml_tensor * dst, int thread, int /*n_threads*/) {
    const auto *  x       = static_cast<const float *>(dst->src[0]->data);
    char *        rows    = static_cast<char *>(dst->data);
    const auto    size    = static_cast<int64_t>(node.packing.row_bytes());
    const int64_t n_units = (node.n_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    auto *        scratch = reinterpret_cast<float *>(node.scratch(thread));
    for (int64_t unit = node.next++; unit < n_units; unit = node.next++) {
        const int64_t end = std::min(node.n_rows, (unit + 1) * ROWS_AT_ONCE);
        for (int64_t row = unit * ROWS_AT_ONCE; row < end; row++) {
            node.nodes->kernels_.write_row(node.packing, x + row * node.packing.n_in,
                                           node.normalise ? &node.norm : nullptr, scratch, rows + row * size);
        }
    }
}

// ---- matrix products ----------------------------------------------------------------------------

ggml_tensor * KernelNodes::linear(ggml_context * ctx, const Linear & layer, const Rows & rows, Epilogue epilogue,
                                  ggml_tensor * residual) {
    Node & node   = new_node();
    node.packing  = rows.packing;
    node.n_rows   = rows.n_rows;
    node.n_out    = ggml_nelements(layer.bias);
    node.weight   = layer.weight;
    node.bias     = static_cast<const float *>(layer.bias->data);
    node.epilogue = epilogue;
    node.panels   = weights_.panels_of(layer.weight);

    std::vector<ggml_tensor *> sources = { rows.tensor };
    if (node.panels == nullptr) {
        const PackedShape shape{ node.packing, node.n_out };
        need_scratch(shape.scratch_bytes());
        Node & packing  = new_node();
        packing.packing = node.packing;
        packing.n_out   = node.n_out;
        packing.weight  = node.weight;
        // Behind the rows, so that the memory plan holds the panels of one product at a time.
        sources.push_back(custom<compute_panels>(ctx, packing, "panels", GGML_TYPE_I8,
                                                 static_cast<int64_t>(shape.bytes()), 1, { rows.tensor }));
    }
    if (residual != nullptr) {
        sources.push_back(residual);
    }
    return custom<compute_linear>(ctx, node, stage_of(layer.weight), GGML_TYPE_F32, node.n_out, node.n_rows, sources);
}

void KernelNodes::compute_panels(Node & node, ggml_tensor * dst, int thread, int /*n_threads*/) {
    const PackedShape shape{ node.packing, node.n_out };
    const size_t      row_size = ggml_row_size(node.weight->type, node.packing.n_in);
    for (int64_t panel = node.next++; panel < shape.n_panels(); panel = node.next++) {
        write_panel(node.nodes->kernels_, shape, node.weight, panel, node.scratch(thread),
                    static_cast<char *>(dst->data));
        const int64_t first = panel * node.packing.nr;
        const int64_t n     = std::min<int64_t>(node.packing.nr, node.n_out - first);
        node.nodes->file_.release(static_cast<const char *>(node.weight->data) + static_cast<size_t>(first) * row_size,
                                  static_cast<size_t>(n) * row_size);
    }
}

void KernelNodes::compute_linear(Node & node, ggml_tensor * dst, int thread, int n_threads) {
    const bool packed   = node.panels != nullptr;
    const int  residual = packed ? 1 : 2;
    if (!packed && thread == 0) {
        // Reading a panel may have mapped pages of the one before again.
        node.nodes->file_.release(node.weight->data, ggml_nbytes(node.weight));
    }
    const LinearTask task{ node.packing,
                           static_cast<const char *>(dst->src[0]->data),
                           packed ? node.panels : static_cast<const char *>(dst->src[1]->data),
                           node.bias,
                           node.epilogue == Epilogue::RESIDUAL ? static_cast<const float *>(dst->src[residual]->data)
                                                               : nullptr,
                           static_cast<float *>(dst->data),
                           node.n_rows,
                           node.n_out,
                           node.epilogue };
    const int64_t    n_panels = (node.n_out + node.packing.nr - 1) / node.packing.nr;
    const int64_t    n_tiles  = (node.n_rows + node.packing.mr - 1) / node.packing.mr;
    const int64_t    wanted   = UNITS_A_THREAD * n_threads;
    const int64_t    n_parts  = std::clamp<int64_t>((wanted + n_panels - 1) / n_panels, 1, n_tiles);  // of the rows
    for (int64_t unit = node.next++; unit < n_panels * n_parts; unit = node.next++) {
        const int64_t part  = unit % n_parts;
        const int64_t begin = n_tiles * part / n_parts * node.packing.mr;
        const int64_t end   = std::min(n_tiles * (part + 1) / n_parts * node.packing.mr, node.n_rows);
        node.nodes->kernels_.linear(task, unit / n_parts, begin, end);
    }
}

// ---- attention ----------------------------------------------------------------------------------

ggml_tensor * KernelNodes::attention(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                                     int64_t n_tokens, int64_t n_head) {
    Node & node   = new_node();
    node.n_rows   = n_rows_of(q);
    node.n_tokens = n_tokens;
    node.n_head   = n_head;
    ggml_tensor * out =
        custom<compute_attention>(ctx, node, "attention", GGML_TYPE_F32, q->ne[0], node.n_rows, { q, k, v });
    AttentionTask task = attention_task(node, out);
    need_scratch(kernels_.attention_scratch_bytes(task));
    return out;
}

AttentionTask KernelNodes::attention_task(const Node & node, const ggml_tensor * dst) {
    const auto      data   = [&](int i) { return static_cast<const float *>(dst->src[i]->data); };
    const int64_t   d_head = dst->ne[0] / node.n_head;
    const Precision p      = node.nodes->precision_;
    return { operand_of(p, Part::TOWER),
             data(0),
             data(1),
             data(2),
             static_cast<float *>(dst->data),
             node.n_tokens,
             d_head,
             dst->ne[0],
             1.0F / std::sqrt(static_cast<float>(d_head)) };
}

void KernelNodes::compute_attention(Node & node, ggml_tensor * dst, int thread, int n_threads) {
    const AttentionTask all     = attention_task(node, dst);
    const int64_t       n_heads = node.n_head * (node.n_rows / node.n_tokens);  // of all pictures
    const int           nr      = node.nodes->kernels_.micro[static_cast<int>(all.operand)].nr;
    const int64_t       n_tiles = (node.n_tokens + nr - 1) / nr;
    // Keys and values are packed anew for each part of a head.
    const int64_t n_parts = std::clamp<int64_t>((4 * n_threads + n_heads - 1) / n_heads, 1, n_tiles);
    for (int64_t unit = node.next++; unit < n_heads * n_parts; unit = node.next++) {
        const int64_t head   = unit / n_parts;
        const int64_t offset = head / node.n_head * node.n_tokens * all.stride + head % node.n_head * all.d_head;
        const int64_t part   = unit % n_parts;

        AttentionTask task = all;
        task.q += offset;
        task.k += offset;
        task.v += offset;
        task.out += offset;
        node.nodes->kernels_.attention(task, n_tiles * part / n_parts * nr,
                                       std::min(n_tiles * (part + 1) / n_parts * nr, node.n_tokens),
                                       node.scratch(thread));
    }
}

}  // namespace omnivlm
