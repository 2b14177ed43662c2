#include "token-rows.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace omnivlm {

TokenRows::TokenRows(GgufReader & reader) {
    const std::string name = "token_embd.weight";
    if (reader.string("general.architecture") == "qwen2" && reader.has_tensor(name)) {
        use(reader, reader.tensor(name));
    }
    file_ = reader.take_file();
    file_.release(file_.data(), file_.size());  // the header has been read
}

void TokenRows::use(const GgufReader & reader, const ggml_tensor * matrix) {
    const ggml_to_float_t to_float = ggml_get_type_traits(matrix->type)->to_float;
    if (ggml_n_dims(matrix) > 2 || (to_float == nullptr && matrix->type != GGML_TYPE_F32)) {
        return;
    }
    data_     = reader.tensor_data(matrix);
    to_float_ = to_float;
    width_    = matrix->ne[0];
    n_rows_   = matrix->ne[1];
    row_size_ = ggml_row_size(matrix->type, width_);
}

void TokenRows::read(const int32_t * tokens, size_t n_tokens, float * out) const {
    for (size_t i = 0; i < n_tokens; i++, out += width_) {
        if (tokens[i] < 0 || tokens[i] >= n_rows_) {
            throw std::out_of_range("there is no token " + std::to_string(tokens[i]));
        }
        const char * row = data_ + row_size_ * static_cast<size_t>(tokens[i]);
        if (to_float_ == nullptr) {
            std::memcpy(out, row, row_size_);
        } else {
            to_float_(row, out, width_);
        }
    }
    file_.release(data_, row_size_ * static_cast<size_t>(n_rows_));
}

}  // namespace omnivlm
