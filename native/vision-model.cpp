#include "vision-model.h"

#include "errors.h"
#include "gguf-reader.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

namespace omnivlm {
namespace {

constexpr int64_t TENSORS_PER_BLOCK = 16;
constexpr size_t  CPU_ALIGNMENT     = 32;  // what ggml's CPU kernels expect of a tensor's address

// Where the two layouts differ by more than a key prefix.
struct Layout {
    std::string  prefix;  // of the metadata keys
    const char * fc1;     // tensor name of a block's MLP up-projection
    const char * fc2;     // ... and down-projection
    bool         published;
};

Layout read_layout(const GgufReader & reader) {
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

VisionHparams read_hparams(const GgufReader & reader, const Layout & layout) {
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
    if (hparams.n_layer > reader.n_tensors() / TENSORS_PER_BLOCK) {
        reader.fail("key " + vision + "block_count is " + std::to_string(hparams.n_layer) +
                    ", more blocks than the file has tensors for");
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
    hparams.n_proj               = reader.checked_dimension("the height of tensor mm.0.weight", proj_in->ne[1]);
    hparams.n_embd_text          = reader.checked_dimension("the height of tensor mm.2.weight", proj_out->ne[1]);
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

    const std::string turns_key = "clip.omnivlm.single_turn";
    hparams.single_turn         = reader.has_key(turns_key) && reader.boolean(turns_key);
    return hparams;
}

// Declares the tensors that the graph uses in a context of their own and remembers their bytes.
class WeightReader {
  public:
    WeightReader(const GgufReader & reader, ggml_context * context) : reader_(reader), context_(context) {}

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
        const bool readable = is_float || ggml_get_type_traits(source->type)->to_float != nullptr;
        if ((!is_float && !ggml_is_quantized(source->type)) || !readable) {
            reject_type(source, "a float or quantized type that files are stored in");
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

    const GgufReader &  reader_;
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
        ggml_backend_buffer_set_usage(model.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
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
    const size_t     n_tensors = 9 + static_cast<size_t>(TENSORS_PER_BLOCK * n_layer);
    ggml_context_ptr context(ggml_init({ n_tensors * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
    if (!context) {
        throw std::bad_alloc();
    }
    return context;
}

}  // namespace

VisionModel load_vision_model(const std::string & path, ggml_backend_dev_t device) {
    GgufReader   reader(path);
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

}  // namespace omnivlm
