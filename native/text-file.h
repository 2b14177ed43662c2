// What must be known of a text model's GGUF file before llama.cpp may load it.

#pragma once

#include "token-rows.h"

#include <string>

namespace omnivlm {

struct TextFile {
    bool      quantized;  // some of its tensors are
    TokenRows rows;
};

// llama.cpp refuses most damaged files, but takes a few things for granted and aborts the process,
// or reads outside an array, where they do not hold: these are checked here. Throws ModelFileError.
TextFile inspect_text_file(const std::string & path);

}  // namespace omnivlm
