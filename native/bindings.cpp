// The native door of omnivlm_edge: types, names, error mapping and the GIL; no arithmetic.

#include "errors.h"
#include "importance.h"
#include "log-sink.h"
#include "mapped-file.h"
#include "peak.h"
#include "quantize.h"
#include "text-file.h"
#include "text-kernels.h"
#include "vision-encoder.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <system_error>

namespace nb = nanobind;
using namespace nb::literals;

namespace omnivlm {
namespace {

using Pixels = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<nb::numpy, float, nb::ndim<3>>;

void check_shape(const VisionEncoder & encoder, const Pixels & pixels) {
    const auto size = static_cast<size_t>(encoder.hparams().image_size);
    if (pixels.shape(1) != 3 || pixels.shape(2) != size || pixels.shape(3) != size) {
        const std::string side = std::to_string(size);
        throw nb::value_error(("pixels must have shape [n, 3, " + side + ", " + side + "]").c_str());
    }
}

Tokens encode(VisionEncoder & encoder, const Pixels & pixels, ImportanceCollector * collector) {
    check_shape(encoder, pixels);
    const VisionHparams & h = encoder.hparams();
    const size_t shape[] = { pixels.shape(0), static_cast<size_t>(h.n_tokens()), static_cast<size_t>(h.n_embd_text) };
    auto         data    = std::unique_ptr<float[]>(new float[shape[0] * shape[1] * shape[2]]);  // not zeroed
    {
        const nb::gil_scoped_release release;
        encoder.encode(pixels.data(), static_cast<int64_t>(shape[0]), data.get(), collector);
    }
    float *           raw = data.get();
    const nb::capsule owner(data.release(), [](void * p) noexcept { delete[] static_cast<float *>(p); });
    return { raw, 3, shape, owner };
}

std::map<std::string, double> profile(VisionEncoder & encoder, const Pixels & pixels) {
    check_shape(encoder, pixels);
    if (pixels.shape(0) != 1) {
        throw nb::value_error("profile takes one picture");
    }
    const nb::gil_scoped_release release;
    return encoder.profile(pixels.data());
}

// Paths travel as bytes: on POSIX systems a file name need not be valid text.
std::string path_of(const nb::bytes & path) {
    return { path.c_str(), path.size() };
}

void construct(VisionEncoder * self, const nb::bytes & path, const std::string & device, int n_threads,
               const std::string & precision, bool low_memory, const std::string & kernels, bool flash_attention) {
    const std::string            file = path_of(path);
    const nb::gil_scoped_release release;
    new (self) VisionEncoder(file, { device, n_threads, precision, kernels, low_memory, flash_attention });
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Kernels * kernels : all_kernels()) {
        if (kernels->supported()) {
            names.emplace_back(kernels->name);
        }
    }
    return names;
}

using Rows    = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Columns = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes   = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

Bytes quantize(const Rows & rows, int type_number, int n_threads, const std::optional<Columns> & importance) {
    if (importance && importance->shape(0) != rows.shape(1)) {
        throw nb::value_error("importance must have one value for each column");
    }
    const auto   type      = static_cast<ggml_type>(type_number);
    const auto   n_rows    = static_cast<int64_t>(rows.shape(0));
    const auto   n_per_row = static_cast<int64_t>(rows.shape(1));
    const size_t row_size  = quantized_row_size(type, n_per_row);
    const size_t shape[]   = { rows.shape(0), row_size };
    auto         data      = std::unique_ptr<uint8_t[]>(new uint8_t[shape[0] * row_size]);  // not zeroed
    {
        const nb::gil_scoped_release release;
        quantize_rows(type, rows.data(), n_rows, n_per_row, importance ? importance->data() : nullptr, n_threads,
                      data.get());
    }
    uint8_t *         raw = data.get();
    const nb::capsule owner(data.release(), [](void * p) noexcept { delete[] static_cast<uint8_t *>(p); });
    return { raw, 2, shape, owner };
}

using TokenIds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats   = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Floats embed(const TextFile & file, const TokenIds & tokens) {
    const size_t shape[] = { tokens.shape(0), static_cast<size_t>(file.rows.width()) };
    auto         data    = std::unique_ptr<float[]>(new float[shape[0] * shape[1]]);  // not zeroed
    file.rows.read(tokens.data(), shape[0], data.get());
    float *           raw = data.get();
    const nb::capsule owner(data.release(), [](void * p) noexcept { delete[] static_cast<float *>(p); });
    return { raw, 2, shape, owner };
}

struct Device {
    std::string name;  // in ggml's registry
    std::string description;
    std::string kind;         // "cpu", "gpu", "igpu", "accel"
    uintptr_t   handle;       // ggml_backend_dev_t, as llama.cpp takes it
    uint64_t    memory_free;  // bytes
    uint64_t    memory_total;
};

const char * kind_name(enum ggml_backend_dev_type type) {
    switch (type) {
    case GGML_BACKEND_DEVICE_TYPE_CPU:
        return "cpu";
    case GGML_BACKEND_DEVICE_TYPE_GPU:
        return "gpu";
    case GGML_BACKEND_DEVICE_TYPE_IGPU:
        return "igpu";
    default:
        return "accel";
    }
}

std::vector<Device> devices() {
    std::vector<Device> result;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t     device = ggml_backend_dev_get(i);
        ggml_backend_dev_props props{};
        ggml_backend_dev_get_props(device, &props);
        result.push_back(Device{ props.name, props.description, kind_name(props.type),
                                 reinterpret_cast<uintptr_t>(device), props.memory_free, props.memory_total });
    }
    return result;
}

std::vector<std::string> backends() {
    std::vector<std::string> names;
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        names.emplace_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    return names;
}

// Native errors become the classes of omnivlm_edge.errors.
void translate(const std::exception_ptr & error, void *) {
    const auto raise = [](const char * name, const char * message) {
        const nb::object type = nb::module_::import_("omnivlm_edge.errors").attr(name);
        // A damaged file's names need not be UTF-8.
        const nb::object text =
            nb::steal(PyUnicode_DecodeUTF8(message, static_cast<Py_ssize_t>(std::strlen(message)), "replace"));
        PyErr_SetObject(type.ptr(), text.ptr());
    };
    try {
        std::rethrow_exception(error);
    } catch (const ModelFileError & e) {
        raise("ModelFileError", e.what());
    } catch (const DeviceError & e) {
        raise("DeviceError", e.what());
    } catch (const std::bad_alloc &) {
        raise("DeviceError", "there is not enough free memory: try low_memory or a smaller quantization");
    } catch (const std::system_error & e) {
        raise("DeviceError", (std::string("no thread could be started (") + e.what() + "): lower n_threads").c_str());
    }
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Vision tower and projector of OmniVLM on ggml.";
    nb::register_exception_translator(translate);
    nb::set_leak_warnings(false);  // a process that is interrupted ends while threads hold a model

    nb::class_<Device>(m, "Device", "One device of ggml's backend registry.")
        .def_ro("name", &Device::name)
        .def_ro("description", &Device::description)
        .def_ro("kind", &Device::kind, "'cpu', 'gpu', 'igpu' or 'accel'.")
        .def_ro("handle", &Device::handle, "Address of the ggml_backend_dev_t.")
        .def_ro("memory_free", &Device::memory_free, "Bytes.")
        .def_ro("memory_total", &Device::memory_total, "Bytes.");

    nb::class_<VisionHparams>(m, "VisionHparams", "What the mmproj file says about the model.")
        .def_ro("image_size", &VisionHparams::image_size, "Pixels, square.")
        .def_ro("patch_size", &VisionHparams::patch_size, "Pixels, square.")
        .def_ro("n_embd", &VisionHparams::n_embd, "Width of the tower.")
        .def_ro("n_layer", &VisionHparams::n_layer)
        .def_ro("n_head", &VisionHparams::n_head)
        .def_ro("n_merge", &VisionHparams::n_merge, "Consecutive patches joined into one token.")
        .def_ro("n_embd_text", &VisionHparams::n_embd_text, "Width of one image token.")
        .def_prop_ro("n_tokens", &VisionHparams::n_tokens, "Image tokens a picture becomes.")
        .def_ro("image_mean", &VisionHparams::image_mean)
        .def_ro("image_std", &VisionHparams::image_std)
        .def_ro("prompt_variant", &VisionHparams::prompt_variant, "Empty when the file names none.")
        .def_ro("single_turn", &VisionHparams::single_turn, "Trained on conversations of one question only.");

    nb::class_<TextFile>(m, "TextFile", "What is known of a text model's file before it is loaded.")
        .def_ro("quantized", &TextFile::quantized, "Some of its tensors are.")
        .def_prop_ro(
            "n_embd", [](const TextFile & self) { return self.rows.width(); },
            "Width of what `embed` gives; 0 for models whose tokens become embeddings in another way.")
        .def("embed", &embed, "tokens"_a.noconvert(),
             "int32 [n] -> float32 [n, n_embd], as llama.cpp computes it. Raises IndexError.");

    nb::class_<ChannelSums>(m, "ChannelSums", "Sums over the rows of activations that one weight matrix multiplied.")
        .def_ro("values", &ChannelSums::values, "One for each input channel.")
        .def_ro("squares", &ChannelSums::squares, "Of the squared values.")
        .def_ro("n_rows", &ChannelSums::n_rows);

    nb::class_<ImportanceCollector>(m, "ImportanceCollector", "Adds up the activations that meet a model's weights.")
        .def(nb::init<>())
        .def_prop_ro(
            "address", [](ImportanceCollector & self) { return reinterpret_cast<uintptr_t>(&self); },
            "What `importance_callback_address` takes as its user data.")
        .def("sums", &ImportanceCollector::sums, "By the weights' names in their files.");
    m.def(
        "importance_callback_address", [] { return reinterpret_cast<uintptr_t>(&ImportanceCollector::callback); },
        "Address of the ggml_backend_sched_eval_callback that collects.");

    nb::class_<VisionEncoder>(m, "VisionEncoder", "The vision path of one mmproj file on one device.")
        .def("__init__", &construct, "path"_a, "device"_a, "n_threads"_a, "precision"_a = "auto",
             "low_memory"_a = false, "kernels"_a = "", "flash_attention"_a = true)
        .def("encode", &encode, "pixels"_a.noconvert(), "collector"_a = nb::none(),
             "float32 [n, 3, image_size, image_size], normalised -> float32 [n, n_tokens, n_embd_text].")
        .def("profile", &profile, "pixels"_a.noconvert(),
             "float32 [1, 3, image_size, image_size] -> seconds of each kind of node, by name.")
        .def_prop_ro("hparams", &VisionEncoder::hparams, nb::rv_policy::reference_internal)
        .def_prop_ro("precision", &VisionEncoder::precision, "What `auto` became; `ggml` where ggml computes.")
        .def_prop_ro("kernels", &VisionEncoder::kernels, "The instruction set; empty where ggml computes.");

    m.def(
        "peak_gops",
        [](const std::string & precision, int n_threads) {
            const nb::gil_scoped_release release;
            return peak_gops(precision_on_cpu(precision, best_kernels()), n_threads);
        },
        "precision"_a, "n_threads"_a,
        "1e9 operations a second of the instructions that a precision's kernels multiply with; 0 for `ggml`.");
    m.def(
        "cpu_precision",
        [](const std::string & precision) { return name_of(precision_on_cpu(precision, best_kernels())); },
        "precision"_a, "What a precision becomes on this machine's CPU.");
    m.def("kernels", &kernel_names, "The instruction sets that this machine has kernels for, the quickest first.");

    m.def("devices", &devices, "Every device that ggml was built with and finds on this machine.");
    m.def("backends", &backends, "What ggml was built with, whether or not it finds a device for it here.");
    m.def(
        "release_mappings", [](const nb::bytes & path) { release_mappings(path_of(path)); }, "path"_a,
        "Gives the memory behind this process's mappings of a file back; it is read again when touched.");
    m.def("ggml_version", &ggml_version);
    m.def("install_text_kernels", &install_text_kernels,
          "Lets llama.cpp multiply and attend by our kernels; False where there are none for this machine.");
    m.def(
        "inspect_text_file", [](const nb::bytes & path) { return inspect_text_file(path_of(path)); }, "path"_a,
        "Raises ModelFileError for damage in a text model's file that llama.cpp would not survive.");

    m.def("quantize", &quantize, "rows"_a.noconvert(), "type"_a, "n_threads"_a, "importance"_a.noconvert() = nb::none(),
          "float32 [n_rows, n_per_row] -> uint8 [n_rows, bytes of a row] in the ggml type of that number.\n\n"
          "`importance`, float32 [n_per_row] and positive, weighs the squared error of each column: with it ggml\n"
          "looks for the scales of least error, which takes longer.\n\n"
          "Releases the GIL. Raises ValueError for a type or row length that ggml cannot do, and for a value\n"
          "that is not finite or larger than 65504.");

    ggml_log_set(log_sink, nullptr);
    m.def(
        "log_sink_address", [] { return reinterpret_cast<uintptr_t>(&log_sink); },
        "Address of the ggml_log_callback that collects errors instead of printing.");
    m.def("take_log_error", &take_log_error, "The first error logged on this thread since the last call.");
    m.def("take_log_placement", &take_log_placement,
          "The lines on this thread, since the last call, that say how much of a model went into which memory.");
}

}  // namespace omnivlm
