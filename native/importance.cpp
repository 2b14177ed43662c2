#include "importance.h"

#include "ggml-backend.h"

namespace omnivlm {
namespace {

// ggml's scheduler calls its copy of a weight on another device `CUDA0#blk.0.attn_q.weight#0`.
std::string name_in_file(const ggml_tensor * weight) {
    const std::string name  = weight->name;
    const size_t      start = name.find('#') + 1;  // 0 without one
    return name.substr(start, name.find('#', start) - start);
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

bool ImportanceCollector::wants(const ggml_tensor * node) {
    if (node->op != GGML_OP_MUL_MAT || node->src[1]->type != GGML_TYPE_F32) {
        return false;
    }
    const ggml_tensor * weight = node->src[0];
    return weight->op == GGML_OP_NONE && ends_with(name_in_file(weight), ".weight");
}

void ImportanceCollector::add(const ggml_tensor * node) {
    const ggml_tensor * x    = node->src[1];  // [n_in, ...]
    const char *        data = static_cast<const char *>(x->data);
    if (!ggml_backend_buffer_is_host(x->buffer)) {
        copy_.resize(ggml_nbytes(x));
        ggml_backend_tensor_get(x, copy_.data(), 0, copy_.size());
        data = copy_.data();
    }

    ChannelSums & sums = sums_[name_in_file(node->src[0])];
    const auto    n_in = static_cast<size_t>(x->ne[0]);
    sums.values.resize(n_in);
    sums.squares.resize(n_in);
    for (int64_t row = 0; row < ggml_nrows(x); row++) {
        const auto   i1     = static_cast<size_t>(row % x->ne[1]);
        const auto   i2     = static_cast<size_t>(row / x->ne[1] % x->ne[2]);
        const auto   i3     = static_cast<size_t>(row / x->ne[1] / x->ne[2]);
        const auto * values = reinterpret_cast<const float *>(data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3]);
        for (size_t i = 0; i < n_in; i++) {
            const double value = values[i];
            sums.values[i] += value;
            sums.squares[i] += value * value;
        }
    }
    sums.n_rows += ggml_nrows(x);
}

bool ImportanceCollector::callback(ggml_tensor * node, bool ask, void * collector) {
    if (ask) {
        return wants(node);
    }
    static_cast<ImportanceCollector *>(collector)->add(node);
    return true;
}

}  // namespace omnivlm
