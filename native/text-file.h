// What must be known of a text model's GGUF file before llama.cpp may load it.

#pragma once

#include <cstdint>
#include <string>

namespace omnivlm {

// `general.architecture` of any GGUF file. Throws ModelFileError when it is not a whole GGUF file.
std::string gguf_architecture(const std::string & path);

struct TextFile {
    bool    quantized   = false;  // some of its tensors are
    int64_t cache_width = 0;      // values that one position adds to the key-value cache
};

// llama.cpp refuses most damaged files, but takes a few things for granted and aborts the process,
// or reads outside an array, where they do not hold: these are checked here. Throws ModelFileError.
TextFile inspect_text_file(const std::string & path);

}  // namespace omnivlm
