#include "text-file.h"

#include "gguf-reader.h"

#include <string_view>
#include <unordered_set>

namespace omnivlm {
namespace {

constexpr int64_t MAX_LAYERS = 512;  // LLAMA_MAX_LAYERS in llama.cpp

}  // namespace

TextFile inspect_text_file(const std::string & path) {
    GgufReader reader(path);

    const std::string layers_key = reader.string("general.architecture") + ".block_count";
    if (reader.dimension(layers_key) > MAX_LAYERS) {
        reader.fail("key " + layers_key + " is more than the " + std::to_string(MAX_LAYERS) +
                    " layers that llama.cpp can load");
    }

    const std::string tokens_key = "tokenizer.ggml.tokens";
    if (!reader.has_key(tokens_key)) {
        reader.fail("key " + tokens_key + " is missing: the file holds no vocabulary");
    }
    const std::vector<std::string>       tokens = reader.strings(tokens_key);
    std::unordered_set<std::string_view> seen;
    seen.reserve(tokens.size());
    for (size_t i = 0; i < tokens.size(); i++) {
        if (!seen.insert(tokens[i]).second) {
            reader.fail("token " + std::to_string(i) + " of key " + tokens_key + " stands there twice: the file is " +
                        "damaged; download or convert it again");
        }
    }
    const std::pair<std::string, gguf_type> parallel[] = {
        { "tokenizer.ggml.token_type", GGUF_TYPE_INT32 },
        { "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32 },
    };
    for (const auto & [key, type] : parallel) {
        if (reader.has_key(key) && reader.array_size(key, type) != tokens.size()) {
            reader.fail("key " + key + " does not have one value for each of the " + std::to_string(tokens.size()) +
                        " tokens");
        }
    }
    return { reader.has_quantized_tensors(), TokenRows(reader) };
}

}  // namespace omnivlm
