#include "gguf-reader.h"

#include "errors.h"
#include "log-sink.h"

#include <cmath>
#include <cstring>

namespace omnivlm {
namespace {

constexpr int64_t MAX_DIMENSION = 1 << 17;  // far above any tower, far below any integer overflow

}  // namespace

GgufReader::GgufReader(const std::string & path) : path_(path), file_(path) {
    if (file_.size() < 4 || std::memcmp(file_.data(), "GGUF", 4) != 0) {
        fail("is not a GGUF file");
    }
    ggml_context *         meta   = nullptr;
    const gguf_init_params params = { /*.no_alloc =*/true, /*.ctx =*/&meta };
    take_log_error();
    gguf_.reset(gguf_init_from_buffer(file_.data(), file_.size(), params));
    meta_.reset(meta);
    if (!gguf_) {
        const std::string reason = take_log_error();
        if (reason.find("not a multiple of block size") != std::string::npos) {
            fail("cannot be read (" + reason + "): the first runtime's quantizer let blocks run from one row " +
                 "into the next; take the F16 file and quantize it with omnivlm-edge quantize");
        }
        fail("is damaged or cut off (" + reason + "); download or convert it again");
    }
}

void GgufReader::fail(const std::string & what) const {
    throw ModelFileError(path_ + ": " + what);
}

bool GgufReader::has_quantized_tensors() const {
    for (ggml_tensor * t = ggml_get_first_tensor(meta_.get()); t != nullptr; t = ggml_get_next_tensor(meta_.get(), t)) {
        if (ggml_is_quantized(t->type)) {
            return true;
        }
    }
    return false;
}

bool GgufReader::has_key(const std::string & key) const {
    return gguf_find_key(gguf_.get(), key.c_str()) >= 0;
}

std::string GgufReader::string(const std::string & key) const {
    const std::string value = gguf_get_val_str(gguf_.get(), require(key, GGUF_TYPE_STRING));
    for (const char c : value) {
        if (c < ' ' || c > '~') {
            fail("key " + key + " is not plain text; download or convert it again");
        }
    }
    return value;
}

int64_t GgufReader::dimension(const std::string & key) const {
    return checked_dimension("key " + key, gguf_get_val_u32(gguf_.get(), require(key, GGUF_TYPE_UINT32)));
}

int64_t GgufReader::checked_dimension(const std::string & what, int64_t value) const {
    if (value < 1 || value > MAX_DIMENSION) {
        fail(what + " is " + std::to_string(value) + ", outside 1.." + std::to_string(MAX_DIMENSION));
    }
    return value;
}

int64_t GgufReader::n_tensors() const {
    return gguf_get_n_tensors(gguf_.get());
}

float GgufReader::number(const std::string & key) const {
    return gguf_get_val_f32(gguf_.get(), require(key, GGUF_TYPE_FLOAT32));
}

bool GgufReader::boolean(const std::string & key) const {
    return gguf_get_val_bool(gguf_.get(), require(key, GGUF_TYPE_BOOL));
}

std::array<float, 3> GgufReader::rgb(const std::string & key) const {
    const int64_t id = require_array(key, GGUF_TYPE_FLOAT32);
    if (gguf_get_arr_n(gguf_.get(), id) != 3) {
        fail("key " + key + " is not an array of three numbers");
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

std::vector<std::string> GgufReader::strings(const std::string & key) const {
    const int64_t            id   = require_array(key, GGUF_TYPE_STRING);
    const size_t             size = gguf_get_arr_n(gguf_.get(), id);
    std::vector<std::string> values;
    values.reserve(size);
    for (size_t i = 0; i < size; i++) {
        values.emplace_back(gguf_get_arr_str(gguf_.get(), id, i));
    }
    return values;
}

size_t GgufReader::array_size(const std::string & key, gguf_type type) const {
    return gguf_get_arr_n(gguf_.get(), require_array(key, type));
}

bool GgufReader::has_tensor(const std::string & name) const {
    return ggml_get_tensor(meta_.get(), name.c_str()) != nullptr;
}

const ggml_tensor * GgufReader::tensor(const std::string & name) const {
    const ggml_tensor * tensor = ggml_get_tensor(meta_.get(), name.c_str());
    if (tensor == nullptr) {
        fail("tensor " + name + " is missing");
    }
    return tensor;
}

char * GgufReader::tensor_data(const ggml_tensor * tensor) const {
    const int64_t id    = gguf_find_tensor(gguf_.get(), tensor->name);
    const size_t  start = gguf_get_data_offset(gguf_.get()) + gguf_get_tensor_offset(gguf_.get(), id);
    const size_t  size  = ggml_nbytes(tensor);
    if (start > file_.size() || size > file_.size() - start) {
        fail("tensor " + std::string(tensor->name) + " reaches beyond the end of the file: it was cut off; " +
             "download or convert it again");
    }
    return file_.data() + start;
}

int64_t GgufReader::require(const std::string & key, gguf_type type) const {
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

int64_t GgufReader::require_array(const std::string & key, gguf_type type) const {
    const int64_t id = require(key, GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(gguf_.get(), id) != type) {
        fail("key " + key + " is an array of " + gguf_type_name(gguf_get_arr_type(gguf_.get(), id)) + " instead of " +
             gguf_type_name(type));
    }
    return id;
}

}  // namespace omnivlm
