// The rows of a text model's token embeddings as float32: what llama.cpp would look up for tokens, for
// batches that hold a picture's embeddings as well.

#pragma once

#include "ggml.h"
#include "gguf-reader.h"
#include "mapped-file.h"

#include <cstddef>
#include <cstdint>

namespace omnivlm {

class TokenRows {
  public:
    // Takes the reader's mapping. There are no rows for an architecture that does more with tokens than
    // look them up (some scale them), and none without the matrix.
    explicit TokenRows(GgufReader & reader);

    int64_t width() const { return width_; }  // values in a row; 0 without rows

    // Fills n_tokens * width() values of `out`. Throws std::out_of_range for what is no token.
    void read(const int32_t * tokens, size_t n_tokens, float * out) const;

  private:
    void use(const GgufReader & reader, const ggml_tensor * matrix);

    MappedFile      file_;  // mapped, so that only the rows that are asked for are ever read
    const char *    data_     = nullptr;
    ggml_to_float_t to_float_ = nullptr;  // null: they are float32
    int64_t         width_    = 0;
    int64_t         n_rows_   = 0;
    size_t          row_size_ = 0;  // bytes
};

}  // namespace omnivlm
