#include "vision-encoder.h"

#include "errors.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

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

bool is_cpu(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

const Kernels & find_kernels(const std::string & name) {
    if (name.empty()) {
        return best_kernels();
    }
    for (const Kernels * kernels : all_kernels()) {
        if (name == kernels->name && kernels->supported()) {
            return *kernels;
        }
    }
    throw std::invalid_argument("this machine has no kernels '" + name + "'");
}

Precision choose_precision(const VisionEncoder::Options & options, bool cpu, const Kernels & kernels) {
    if (cpu) {
        return precision_on_cpu(options.precision, kernels);
    }
    if (options.precision != "auto" && precision_named(options.precision) != Precision::GGML) {
        throw DeviceError("vision precision '" + options.precision + "' is for the CPU; device '" + options.device +
                          "' computes in the file's own types: take 'auto'");
    }
    return Precision::GGML;
}

void load_pixels(const VisionGraph & graph, const float * pixels) {
    ggml_backend_tensor_set(graph.pixels, pixels, 0, ggml_nbytes(graph.pixels));
    if (graph.kernels) {
        graph.kernels->reset();
    }
}

std::vector<PackedWeights::Source> matrices(const VisionModel & model, const Kernels & kernels, Precision precision) {
    std::vector<PackedWeights::Source> sources;
    const auto                         add = [&](const Linear & layer, Part part, int64_t n_in) {
        sources.push_back({ layer.weight, { packing_of(kernels, precision, part, n_in), layer.bias->ne[0] } });
    };
    const VisionHparams & h = model.hparams;
    add(model.patch_embd, Part::PATCHES, h.patch_size * h.patch_size * 3);
    for (const VisionBlock & block : model.blocks) {
        for (const Linear * layer : { &block.q, &block.k, &block.v, &block.out, &block.fc1 }) {
            add(*layer, Part::TOWER, h.n_embd);
        }
        add(block.fc2, Part::TOWER, h.n_ff);
    }
    add(model.projector_in, Part::PROJECTOR, h.n_embd * h.n_merge);
    add(model.projector_out, Part::PROJECTOR, h.n_proj);
    return sources;
}

}  // namespace

VisionEncoder::VisionEncoder(const std::string & path, const Options & options) : options_(options) {
    if (options.n_threads < 1) {
        throw std::invalid_argument("n_threads must be at least 1");
    }
    ggml_backend_dev_t device  = find_device(options.device);
    const Kernels &    kernels = find_kernels(options.kernels);

    precision_ = choose_precision(options, is_cpu(device), kernels);
    lane_      = new_lane(options.n_threads);
    model_     = load_vision_model(path, device);
    if (precision_ == Precision::GGML) {
        return;
    }
    kernels_ = &kernels;
    copy_vectors();
    if (!options.low_memory) {
        packed_ = PackedWeights(kernels, matrices(model_, kernels, precision_), model_.file, options.n_threads);
    }
}

// Norms and biases lie between the matrices all over the file: reading one maps its neighbours, too.
void VisionEncoder::copy_vectors() {
    const auto each = [this](const auto & use) {
        ggml_context * ctx = model_.context.get();
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (ggml_n_dims(t) == 1) {
                use(t, GGML_PAD(ggml_nbytes(t), size_t{ 64 }));
            }
        }
    };
    size_t total = 0;
    each([&](const ggml_tensor *, size_t size) { total += size; });
    vectors_  = allocate_aligned(total);
    char * at = vectors_.get();
    each([&](ggml_tensor * vector, size_t size) {
        std::memcpy(at, vector->data, ggml_nbytes(vector));
        vector->data = at;
        at += size;
    });
    model_.file.release(model_.file.data(), model_.file.size());
}

const char * VisionEncoder::precision() const {
    return name_of(precision_);
}

const char * VisionEncoder::kernels() const {
    return kernels_ == nullptr ? "" : kernels_->name;
}

VisionEncoder::Lane VisionEncoder::new_lane(int n_threads) const {
    Lane lane;
    lane.n_threads = n_threads;
    lane.backend   = init_backend(find_device(options_.device), n_threads);
    lane.allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(lane.backend.get())));
    return lane;
}

VisionGraph VisionEncoder::build(const Lane & lane, int64_t n_images, bool with_kernels) const {
    if (with_kernels) {
        auto nodes = std::make_unique<KernelNodes>(*kernels_, precision_, packed_, model_.file, lane.n_threads);
        return build_vision_graph(model_, n_images, Attention::FLASH, std::move(nodes));
    }
    if (options_.flash_attention) {
        VisionGraph graph = build_vision_graph(model_, n_images, Attention::FLASH, nullptr);
        if (first_unsupported(lane.backend.get(), graph.graph) == nullptr) {
            return graph;
        }
    }
    return build_vision_graph(model_, n_images, Attention::EXPLICIT, nullptr);
}

void VisionEncoder::prepare(Lane & lane, int64_t n_images, bool with_kernels) const {
    if (n_images == lane.n_images && with_kernels == (lane.graph.kernels != nullptr)) {
        return;
    }
    lane.n_images = 0;
    lane.graph    = build(lane, n_images, with_kernels);
    if (const ggml_tensor * node = first_unsupported(lane.backend.get(), lane.graph.graph)) {
        const ggml_tensor * weight = node->src[0];
        throw DeviceError("device '" + options_.device + "' cannot compute " + ggml_op_desc(node) + " on " +
                          ggml_type_name(weight != nullptr ? weight->type : node->type) + "; use device 'cpu'");
    }
    if (!ggml_gallocr_alloc_graph(lane.allocator.get(), lane.graph.graph)) {
        throw DeviceError("device '" + options_.device + "' has not enough free memory to encode a picture");
    }
    lane.n_images = n_images;
}

std::map<std::string, double> VisionEncoder::profile(const float * pixels) {
    const std::lock_guard<std::mutex> lock(mutex_);
    prepare(lane_, 1, kernels_ != nullptr);
    load_pixels(lane_.graph, pixels);
    std::map<std::string, double> seconds;
    auto                          start = std::chrono::steady_clock::now();
    const auto                    stop  = [&](const ggml_tensor * node) {
        const auto        now  = std::chrono::steady_clock::now();
        const std::string name = node->op == GGML_OP_CUSTOM ? node->name : ggml_op_desc(node);
        seconds[name] += std::chrono::duration<double>(now - start).count();
        start = now;
    };
    compute_in_parts(lane_, [](const ggml_tensor *) { return true; }, stop);
    return seconds;
}

void VisionEncoder::compute(const Lane & lane, ggml_cgraph * graph) const {
    if (ggml_backend_graph_compute(lane.backend.get(), graph) != GGML_STATUS_SUCCESS) {
        throw DeviceError("device '" + options_.device + "' failed while it encoded a picture");
    }
}

// What comes after a node may overwrite its input, so the graph stops there.
void VisionEncoder::compute_in_parts(const Lane & lane, const std::function<bool(const ggml_tensor *)> & wanted,
                                     const std::function<void(const ggml_tensor *)> & computed) const {
    ggml_cgraph *    all     = lane.graph.graph;
    const int        n_nodes = ggml_graph_n_nodes(all);
    const auto       size    = static_cast<size_t>(n_nodes);
    ggml_context_ptr context(ggml_init({ ggml_graph_overhead_custom(size, false), nullptr, /*.no_alloc =*/true }));
    if (!context) {
        throw std::bad_alloc();
    }
    ggml_cgraph * part = ggml_new_graph_custom(context.get(), size, false);
    for (int i = 0; i < n_nodes; i++) {
        ggml_tensor * node = ggml_graph_node(all, i);
        const bool    stop = wanted(node);
        ggml_graph_add_node(part, node);
        if (stop || i == n_nodes - 1) {
            compute(lane, part);
            ggml_graph_clear(part);
        }
        if (stop) {
            computed(node);
        }
    }
}

void VisionEncoder::encode_batch(Lane & lane, const float * pixels, int64_t n_images, float * tokens,
                                 ImportanceCollector * collector) const {
    prepare(lane, n_images, kernels_ != nullptr && collector == nullptr);  // a collector looks at ggml's products
    load_pixels(lane.graph, pixels);
    if (collector == nullptr) {
        compute(lane, lane.graph.graph);
    } else {
        compute_in_parts(lane, ImportanceCollector::wants, [&](const ggml_tensor * node) { collector->add(node); });
    }
    ggml_backend_tensor_get(lane.graph.tokens, tokens, 0, ggml_nbytes(lane.graph.tokens));
    if (kernels_ != nullptr) {  // host memory is quick to get again, and the text model can use it meanwhile
        lane.n_images = 0;
        lane.graph    = {};
        lane.allocator.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(lane.backend.get())));
    }
}

void VisionEncoder::encode_side_by_side(const float * pixels, int64_t n_images, float * tokens) const {
    const VisionHparams &          h         = model_.hparams;
    const int                      n_threads = options_.n_threads / static_cast<int>(n_images);
    std::vector<std::future<void>> lanes;
    for (int64_t i = 0; i < n_images; i++) {
        lanes.push_back(std::async(std::launch::async, [this, &h, n_threads, pixels, tokens, i] {
            Lane lane = new_lane(n_threads);
            encode_batch(lane, pixels + i * h.n_pixels(), 1, tokens + i * h.n_tokens() * h.n_embd_text, nullptr);
        }));
    }
    for (std::future<void> & lane : lanes) {
        lane.get();  // if one throws, the others' ends are waited for
    }
}

int64_t VisionEncoder::n_together(int64_t n_left, bool collects) const {
    if (kernels_ == nullptr || collects) {
        return std::min(MAX_BATCH, n_left);
    }
    if (options_.low_memory) {
        return 1;
    }
    int64_t n = std::min<int64_t>(options_.n_threads, n_left);
    while (options_.n_threads % n != 0) {  // no thread without work
        n--;
    }
    return n;
}

void VisionEncoder::encode(const float * pixels, int64_t n_images, float * tokens, ImportanceCollector * collector) {
    const std::lock_guard<std::mutex> lock(mutex_);

    const VisionHparams & h = model_.hparams;
    for (int64_t done = 0; done < n_images;) {
        const int64_t n   = n_together(n_images - done, collector != nullptr);
        const float * in  = pixels + done * h.n_pixels();
        float *       out = tokens + done * h.n_tokens() * h.n_embd_text;
        if (n > 1 && kernels_ != nullptr) {
            encode_side_by_side(in, n, out);
        } else {
            encode_batch(lane_, in, n, out, collector);
        }
        done += n;
    }
}

}  // namespace omnivlm
