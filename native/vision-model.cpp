#include "vision-model.h"

#include "errors.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

namespace omnivlm {
namespace {

constexpr int64_t MAX_DIMENSION = 1 << 17;  // far above any tower, far below any integer overflow
constexpr size_t  CPU_ALIGNMENT = 32;       // what ggml's CPU kernels expect of a tensor's address

// While it lives, ggml's error messages of this thread are collected instead of printed.
class LogCapture {
  public:
    LogCapture() {
        ggml_log_get(&previous_, &previous_data_);
        text().clear();
        ggml_log_set(collect, nullptr);
    }

    ~LogCapture() { ggml_log_set(previous_, previous_data_); }

    LogCapture(const LogCapture &)             = delete;
    LogCapture & operator=(const LogCapture &) = delete;

    // The first message, without ggml's function name and line end.
    static std::string reason() {
        const std::string line  = text().substr(0, text().find('\n'));
        const size_t      colon = line.find(": ");
        return colon == std::string::npos ? line : line.substr(colon + 2);
    }

  private:
    static std::string & text() {
        thread_local std::string collected;
        return collected;
    }

    static void collect(ggml_log_level level, const char * message, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            text() += message;
        }
    }

    ggml_log_callback previous_      = nullptr;
    void *            previous_data_ = nullptr;
};

gguf_context_ptr parse_gguf(const std::string & path, const MappedFile & file, ggml_context ** meta) {
    if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0) {
        throw ModelFileError(path + ": is not a GGUF file");
    }
    const gguf_init_params params = { /*.no_alloc =*/true, /*.ctx =*/meta };
    const LogCapture       log;
    gguf_context_ptr       gguf(gguf_init_from_buffer(file.data(), file.size(), params));
    if (!gguf) {
        throw ModelFileError(path + ": is damaged or cut off (" + LogCapture::reason() +
                             "); download or convert it again");
    }
    return gguf;
}

std::string string_value(const std::string & path, const gguf_context_ptr & gguf, int64_t id) {
    const std::string value = gguf_get_val_str(gguf.get(), id);
    for (const char c : value) {
        if (c < ' ' || c > '~') {
            throw ModelFileError(path + ": key " + gguf_get_key(gguf.get(), id) +
                                 " is not plain text; download or convert it again");
        }
    }
    return value;
}

// Typed, checked access to the keys and tensors of one file.
class Reader {
  public:
    explicit Reader(const std::string & path) : path_(path), file_(path) {
        ggml_context * meta = nullptr;
        gguf_               = parse_gguf(path, file_, &meta);
        meta_.reset(meta);
    }

    [[noreturn]] void fail(const std::string & what) const { throw ModelFileError(path_ + ": " + what); }

    bool has_key(const std::string & key) const { return gguf_find_key(gguf_.get(), key.c_str()) >= 0; }

    std::string string(const std::string & key) const {
        return string_value(path_, gguf_, require(key, GGUF_TYPE_STRING));
    }

    // A count or size: 1 .. MAX_DIMENSION.
    int64_t dimension(const std::string & key) const {
        const int64_t value = gguf_get_val_u32(gguf_.get(), require(key, GGUF_TYPE_UINT32));
        if (value < 1 || value > MAX_DIMENSION) {
            fail("key " + key + " is " + std::to_string(value) + ", outside 1.." + std::to_string(MAX_DIMENSION));
        }
        return value;
    }

    float number(const std::string & key) const {
        return gguf_get_val_f32(gguf_.get(), require(key, GGUF_TYPE_FLOAT32));
    }

    std::array<float, 3> rgb(const std::string & key) const {
        const int64_t id = require(key, GGUF_TYPE_ARRAY);
        if (gguf_get_arr_type(gguf_.get(), id) != GGUF_TYPE_FLOAT32 || gguf_get_arr_n(gguf_.get(), id) != 3) {
            fail("key " + key + " is not an array of three float32");
        }
        std::array<float, 3> values{};
        std::memcpy(values.data(), gguf_get_arr_data(gguf_.get(), id), sizeof(values));
        for (const float value : values) {
            if (!std::isfinite(value)) {
                fail("key " + key + " holds a value that is not finite");
            }
        }
        return values;
    }

    const ggml_tensor * tensor(const std::string & name) const {
        const ggml_tensor * tensor = ggml_get_tensor(meta_.get(), name.c_str());
        if (tensor == nullptr) {
            fail("tensor " + name + " is missing");
        }
        return tensor;
    }

    // Where the tensor's bytes stand in the mapping; they are inside the file.
    char * tensor_data(const ggml_tensor * tensor) const {
        const int64_t id    = gguf_find_tensor(gguf_.get(), tensor->name);
        const size_t  start = gguf_get_data_offset(gguf_.get()) + gguf_get_tensor_offset(gguf_.get(), id);
        const size_t  size  = ggml_nbytes(tensor);
        if (start > file_.size() || size > file_.size() - start) {
            fail("tensor " + std::string(tensor->name) + " reaches beyond the end of the file: it was cut off; " +
                 "download or convert it again");
        }
        return file_.data() + start;
    }

    const MappedFile & file() const { return file_; }

    MappedFile take_file() { return std::move(file_); }

  private:
    int64_t require(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf_.get(), key.c_str());
        if (id < 0) {
            fail("key " + key + " is missing");
        }
        if (gguf_get_kv_type(gguf_.get(), id) != type) {
            fail("key " + key + " has type " + gguf_type_name(gguf_get_kv_type(gguf_.get(), id)) + " instead of " +
                 gguf_type_name(type));
        }
        return id;
    }

    std::string      path_;
    MappedFile       file_;
    gguf_context_ptr gguf_;
    ggml_context_ptr meta_;
};

// Where the two layouts differ by more than a key prefix.
struct Layout {
    std::string  prefix;  // of the metadata keys
    const char * fc1;     // tensor name of a block's MLP up-projection
    const char * fc2;     // ... and down-projection
    bool         published;
};

Layout read_layout(const Reader & reader) {
    const std::string architecture = reader.string("general.architecture");
    if (architecture == "siglip") {
        return { "siglip.", "ffn_down", "ffn_up", true };  // the published converter swapped the names
    }
    if (architecture == "clip") {
        const std::string projector = reader.has_key("clip.projector_type") ? reader.string("clip.projector_type") : "";
        if (projector != "omnivlm") {
            reader.fail("is a clip file with projector type '" + projector +
                        "', not 'omnivlm': it belongs to another model");
        }
        return { "clip.", "ffn_up", "ffn_down", false };
    }
    reader.fail("has architecture '" + architecture + "': it is no vision file (siglip or clip); " +
                "pass the mmproj file here and the text model as the model");
}

VisionHparams read_hparams(const Reader & reader, const Layout & layout) {
    const std::string vision = layout.prefix + "vision.";

    VisionHparams hparams;
    hparams.image_size = reader.dimension(vision + "image_size");
    hparams.patch_size = reader.dimension(vision + "patch_size");
    hparams.n_embd     = reader.dimension(vision + "embedding_length");
    hparams.n_ff       = reader.dimension(vision + "feed_forward_length");
    hparams.n_layer    = reader.dimension(vision + "block_count");
    hparams.n_head     = reader.dimension(vision + "attention.head_count");
    hparams.image_mean = reader.rgb(vision + "image_mean");
    hparams.image_std  = reader.rgb(vision + "image_std");
    if (hparams.patch_size > hparams.image_size) {
        reader.fail("key " + vision + "patch_size is larger than image_size");
    }
    if (hparams.n_embd % hparams.n_head != 0) {
        reader.fail("key " + vision + "attention.head_count does not divide embedding_length");
    }
    for (const float value : hparams.image_std) {
        if (value <= 0.0F) {
            reader.fail("key " + vision + "image_std holds a value that is not positive");
        }
    }

    // The projector's widths are those of its tensors; the merge factor follows from them.
    const ggml_tensor * proj_in  = reader.tensor("mm.0.weight");  // [n_embd*n_merge, n_proj]
    const ggml_tensor * proj_out = reader.tensor("mm.2.weight");  // [n_proj, n_embd_text]
    hparams.n_merge              = proj_in->ne[0] / hparams.n_embd;
    hparams.n_proj               = proj_in->ne[1];
    hparams.n_embd_text          = proj_out->ne[1];
    if (hparams.n_merge < 1 || proj_in->ne[0] % hparams.n_embd != 0 || hparams.n_patches() % hparams.n_merge != 0) {
        reader.fail("tensor mm.0.weight takes rows of " + std::to_string(proj_in->ne[0]) +
                    " values, which is no whole " + "number of patches that divides the " +
                    std::to_string(hparams.n_patches()) + " patches of " + std::to_string(hparams.n_embd) + " values");
    }

    if (layout.published) {
        hparams.eps                = 1e-6F;  // fixed in the original's code
        hparams.projector_gelu_erf = false;  // the original's runtime used the tanh approximation
        return hparams;
    }

    hparams.eps = reader.number(vision + "attention.layer_norm_epsilon");
    if (!(hparams.eps > 0.0F && hparams.eps < 1.0F)) {
        reader.fail("key " + vision + "attention.layer_norm_epsilon is not between 0 and 1");
    }
    const std::string merge_key = vision + "projector.merge_factor";
    if (reader.has_key(merge_key) && reader.dimension(merge_key) != hparams.n_merge) {
        reader.fail("key " + merge_key + " does not fit tensor mm.0.weight, which joins " +
                    std::to_string(hparams.n_merge) + " patches");
    }
    const std::string width_key = vision + "projection_dim";
    if (reader.dimension(width_key) != hparams.n_embd_text) {
        reader.fail("key " + width_key + " does not fit tensor mm.2.weight, which gives " +
                    std::to_string(hparams.n_embd_text) + " values");
    }
    const std::string gelu = reader.string(vision + "projector.gelu");
    if (gelu != "erf" && gelu != "tanh") {
        reader.fail("key " + vision + "projector.gelu is '" + gelu + "', not 'erf' or 'tanh'");
    }
    hparams.projector_gelu_erf = gelu == "erf";
    hparams.prompt_variant     = reader.string("clip.omnivlm.prompt_variant");
    return hparams;
}

// Declares the tensors that the graph uses in a context of their own and remembers their bytes.
class WeightReader {
  public:
    WeightReader(const Reader & reader, ggml_context * context) : reader_(reader), context_(context) {}

    Linear linear(const std::string & name, std::vector<int64_t> shape) {
        const int64_t n_out = shape.back();
        return { declare(name + ".weight", std::move(shape)), vector(name + ".bias", n_out) };
    }

    LayerNorm layer_norm(const std::string & name, int64_t n) {
        return { vector(name + ".weight", n), vector(name + ".bias", n) };
    }

    ggml_tensor * declare(const std::string & name, std::vector<int64_t> shape) {
        const ggml_tensor * source = checked(name, shape);
        const bool          is_float =
            source->type == GGML_TYPE_F32 || source->type == GGML_TYPE_F16 || source->type == GGML_TYPE_BF16;
        if (!is_float && !ggml_is_quantized(source->type)) {
            reject_type(source, "a float or quantized type");
        }
        return add(source);
    }

    // Fills model.buffer; false when the weights were copied and the mapping is needed no more.
    bool place(VisionModel & model, ggml_backend_dev_t device);

  private:
    struct Weight {
        ggml_tensor * tensor;
        char *        data;  // in the mapping
    };

    ggml_tensor * vector(const std::string & name, int64_t n) {
        const ggml_tensor * source = checked(name, { n });
        if (source->type != GGML_TYPE_F32) {
            reject_type(source, "F32");
        }
        return add(source);
    }

    const ggml_tensor * checked(const std::string & name, std::vector<int64_t> shape) const {
        const ggml_tensor * source = reader_.tensor(name);
        shape.resize(GGML_MAX_DIMS, 1);
        if (!std::equal(shape.begin(), shape.end(), source->ne)) {
            reader_.fail("tensor " + name + " has shape " + describe(source->ne) + " instead of " +
                         describe(shape.data()) + " (ggml order)");
        }
        return source;
    }

    [[noreturn]] void reject_type(const ggml_tensor * source, const std::string & wanted) const {
        reader_.fail("tensor " + std::string(source->name) + " has type " + ggml_type_name(source->type) +
                     " instead of " + wanted);
    }

    static std::string describe(const int64_t * shape) {
        std::string text = "[";
        for (int i = 0; i < GGML_MAX_DIMS; i++) {
            text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
        }
        return text + "]";
    }

    ggml_tensor * add(const ggml_tensor * source) {
        ggml_tensor * tensor = ggml_dup_tensor(context_, source);
        ggml_set_name(tensor, source->name);
        weights_.push_back({ tensor, reader_.tensor_data(source) });
        return tensor;
    }

    const Reader &      reader_;
    ggml_context *      context_;
    std::vector<Weight> weights_;
};

// Devices that can use host memory (CPU, Metal) get the file's mapping itself; others a copy.
bool WeightReader::place(VisionModel & model, ggml_backend_dev_t device) {
    ggml_backend_dev_props props{};
    ggml_backend_dev_get_props(device, &props);

    size_t largest = 0;
    bool   aligned = true;
    for (const Weight & weight : weights_) {
        largest = std::max(largest, ggml_nbytes(weight.tensor));
        aligned = aligned && reinterpret_cast<uintptr_t>(weight.data) % CPU_ALIGNMENT == 0;
    }
    if (props.caps.buffer_from_host_ptr && aligned) {
        const MappedFile & file = reader_.file();
        model.buffer.reset(ggml_backend_dev_buffer_from_host_ptr(device, file.data(), file.size(), largest));
    }
    if (model.buffer) {
        for (const Weight & weight : weights_) {
            if (ggml_backend_tensor_alloc(model.buffer.get(), weight.tensor, weight.data) != GGML_STATUS_SUCCESS) {
                throw DeviceError(std::string(props.name) + " cannot use the mapped weights");
            }
        }
        return true;
    }

    model.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_, ggml_backend_dev_buffer_type(device)));
    if (!model.buffer) {
        throw DeviceError(std::string(props.name) +
                          " has not enough free memory for the vision weights; try device 'cpu'");
    }
    ggml_backend_buffer_set_usage(model.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (const Weight & weight : weights_) {
        ggml_backend_tensor_set(weight.tensor, weight.data, 0, ggml_nbytes(weight.tensor));
    }
    return false;
}

ggml_context_ptr weight_context(int64_t n_layer) {
    const size_t     n_tensors = 9 + 16 * static_cast<size_t>(n_layer);
    ggml_context_ptr context(ggml_init({ n_tensors * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (!context) {
        throw std::bad_alloc();
    }
    return context;
}

}  // namespace

VisionModel load_vision_model(const std::string & path, ggml_backend_dev_t device) {
    Reader       reader(path);
    const Layout layout = read_layout(reader);

    VisionModel model;
    model.hparams           = read_hparams(reader, layout);
    model.context           = weight_context(model.hparams.n_layer);
    const VisionHparams & h = model.hparams;

    WeightReader weights(reader, model.context.get());
    model.patch_embd    = weights.linear("v.patch_embd", { h.patch_size, h.patch_size, 3, h.n_embd });
    model.position_embd = weights.declare("v.position_embd.weight", { h.n_embd, h.n_patches() });
    for (int64_t i = 0; i < h.n_layer; i++) {
        const std::string block = "v.blk." + std::to_string(i) + ".";
        model.blocks.push_back({
            weights.layer_norm(block + "ln1", h.n_embd),
            weights.linear(block + "attn_q", { h.n_embd, h.n_embd }),
            weights.linear(block + "attn_k", { h.n_embd, h.n_embd }),
            weights.linear(block + "attn_v", { h.n_embd, h.n_embd }),
            weights.linear(block + "attn_out", { h.n_embd, h.n_embd }),
            weights.layer_norm(block + "ln2", h.n_embd),
            weights.linear(block + layout.fc1, { h.n_embd, h.n_ff }),
            weights.linear(block + layout.fc2, { h.n_ff, h.n_embd }),
        });
    }
    model.post_ln       = weights.layer_norm("v.post_ln", h.n_embd);
    model.projector_in  = weights.linear("mm.0", { h.n_embd * h.n_merge, h.n_proj });
    model.projector_out = weights.linear("mm.2", { h.n_proj, h.n_embd_text });

    if (weights.place(model, device)) {
        model.file = reader.take_file();
    }
    return model;
}

std::string gguf_architecture(const std::string & path) {
    const MappedFile       file(path);
    const gguf_context_ptr gguf = parse_gguf(path, file, nullptr);
    const int64_t          id   = gguf_find_key(gguf.get(), "general.architecture");
    if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_STRING) {
        throw ModelFileError(path + ": key general.architecture is missing");
    }
    return string_value(path, gguf, id);
}

}  // namespace omnivlm
