// Typed, checked access to the keys and tensors of one GGUF file. Whatever is wrong with the file
// becomes a ModelFileError that names the file and the key or tensor.

#pragma once

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "mapped-file.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace omnivlm {

class GgufReader {
  public:
    explicit GgufReader(const std::string & path);

    [[noreturn]] void fail(const std::string & what) const;

    // `value` itself if it is 1 .. 131072; `what` names it in the error.
    int64_t checked_dimension(const std::string & what, int64_t value) const;

    int64_t n_tensors() const;
    bool    has_quantized_tensors() const;

    bool has_key(const std::string & key) const;

    std::string          string(const std::string & key) const;     // printable ASCII
    int64_t              dimension(const std::string & key) const;  // a u32 count or size, 1 .. 131072
    float                number(const std::string & key) const;     // f32
    bool                 boolean(const std::string & key) const;
    std::array<float, 3> rgb(const std::string & key) const;  // f32[3], finite

    std::vector<std::string> strings(const std::string & key) const;
    size_t                   array_size(const std::string & key, gguf_type type) const;

    bool                has_tensor(const std::string & name) const;
    const ggml_tensor * tensor(const std::string & name) const;         // shape and type only
    char *              tensor_data(const ggml_tensor * tensor) const;  // in the mapping, inside the file

    const MappedFile & file() const { return file_; }

    MappedFile take_file() { return std::move(file_); }

  private:
    int64_t require(const std::string & key, gguf_type type) const;
    int64_t require_array(const std::string & key, gguf_type type) const;

    std::string      path_;
    MappedFile       file_;
    gguf_context_ptr gguf_;
    ggml_context_ptr meta_;  // tensors without data
};

}  // namespace omnivlm
