#include "vision-encoder.h"

#include "errors.h"

#include <algorithm>
#include <new>

namespace omnivlm {
namespace {

// Bounds the activations' memory: about 20 MB a picture at the published sizes.
constexpr int64_t MAX_BATCH = 8;

ggml_backend_dev_t find_device(const std::string & name) {
    ggml_backend_dev_t device = ggml_backend_dev_by_name(name.c_str());
    if (device == nullptr) {
        throw DeviceError("device '" + name + "' does not exist here");
    }
    return device;
}

ggml_backend_ptr init_backend(ggml_backend_dev_t device, int n_threads) {
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw DeviceError(std::string("device '") + ggml_backend_dev_name(device) + "' cannot be started");
    }
    ggml_backend_reg_t registry      = ggml_backend_dev_backend_reg(device);
    const auto         set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
    if (set_n_threads != nullptr) {
        set_n_threads(backend.get(), n_threads);
    }
    return backend;
}

const ggml_tensor * first_unsupported(ggml_backend_t backend, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!ggml_backend_supports_op(backend, node)) {
            return node;
        }
    }
    return nullptr;
}

}  // namespace

VisionEncoder::VisionEncoder(const std::string & path, const std::string & device, int n_threads, bool flash_attention)
    : device_name_(device),
      flash_attention_(flash_attention),
      backend_(init_backend(find_device(device), n_threads)),
      model_(load_vision_model(path, find_device(device))),
      allocator_(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend_.get()))) {}

void VisionEncoder::prepare(int64_t n_images) {
    if (n_images == graph_images_) {
        return;
    }
    graph_images_ = 0;
    graph_        = build_vision_graph(model_, n_images, flash_attention_ ? Attention::FLASH : Attention::EXPLICIT);
    if (flash_attention_ && first_unsupported(backend_.get(), graph_.graph) != nullptr) {
        graph_ = build_vision_graph(model_, n_images, Attention::EXPLICIT);
    }
    if (const ggml_tensor * node = first_unsupported(backend_.get(), graph_.graph)) {
        const ggml_tensor * weight = node->src[0];
        throw DeviceError("device '" + device_name_ + "' cannot compute " + ggml_op_desc(node) + " on " +
                          ggml_type_name(weight != nullptr ? weight->type : node->type) + "; use device 'cpu'");
    }
    if (!ggml_gallocr_alloc_graph(allocator_.get(), graph_.graph)) {
        throw DeviceError("device '" + device_name_ + "' has not enough free memory to encode a picture");
    }
    graph_images_ = n_images;
}

void VisionEncoder::compute(ggml_cgraph * graph) {
    if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS) {
        throw DeviceError("device '" + device_name_ + "' failed while it encoded a picture");
    }
}

// The graph up to each node that the collector wants, because what comes later may overwrite the node's input.
void VisionEncoder::compute_in_parts(ImportanceCollector & collector) {
    const int        n_nodes = ggml_graph_n_nodes(graph_.graph);
    const auto       size    = static_cast<size_t>(n_nodes);
    ggml_context_ptr context(ggml_init({ ggml_graph_overhead_custom(size, false), nullptr, /*.no_alloc =*/true }));
    if (!context) {
        throw std::bad_alloc();
    }
    ggml_cgraph * part = ggml_new_graph_custom(context.get(), size, false);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node   = ggml_graph_node(graph_.graph, i);
        const bool    wanted = ImportanceCollector::wants(node);
        ggml_graph_add_node(part, node);
        if (wanted || i == n_nodes - 1) {
            compute(part);
            ggml_graph_clear(part);
        }
        if (wanted) {
            collector.add(node);
        }
    }
}

void VisionEncoder::encode_batch(const float * pixels, int64_t n_images, float * tokens,
                                 ImportanceCollector * collector) {
    prepare(n_images);
    ggml_backend_tensor_set(graph_.pixels, pixels, 0, ggml_nbytes(graph_.pixels));
    if (collector == nullptr) {
        compute(graph_.graph);
    } else {
        compute_in_parts(*collector);
    }
    ggml_backend_tensor_get(graph_.tokens, tokens, 0, ggml_nbytes(graph_.tokens));
}

void VisionEncoder::encode(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector) {
    const std::lock_guard<std::mutex> lock(mutex_);

    const VisionHparams & h         = model_.hparams;
    const int64_t         image_in  = 3 * h.image_size * h.image_size;
    const int64_t         image_out = h.n_tokens() * h.n_embd_text;
    for (int64_t done = 0; done < n_images; done += MAX_BATCH) {
        encode_batch(pixels + done * image_in, std::min(MAX_BATCH, n_images - done), tokens + done * image_out,
                     collector);
    }
}

}  // namespace omnivlm
