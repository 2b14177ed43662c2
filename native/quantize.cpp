#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <stdexcept>
#include <string>
#include <vector>

namespace omnivlm {
namespace {

constexpr float MAX_VALUE = 65504.0F;  // the largest F16; scales are never larger than the values

void quantize_part(ggml_type type, const float * values, int64_t first, int64_t last, int64_t n_per_row,
                   const float * importance, void * out) {
    // ggml's code neither expects nor reports such values.
    const bool fits = std::all_of(values + first * n_per_row, values + last * n_per_row,
                                  [](float value) { return std::abs(value) <= MAX_VALUE; });
    if (!fits) {
        throw std::range_error("holds a value that is not finite or larger than 65504");
    }
    ggml_quantize_chunk(type, values, out, first * n_per_row, last - first, n_per_row, importance);
}

}  // namespace

size_t quantized_row_size(ggml_type type, int64_t n_per_row) {
    // ggml aborts on the types that it only computes with; it cannot read those back either.
    const bool known = type >= 0 && type < GGML_TYPE_COUNT && ggml_get_type_traits(type)->to_float != nullptr;
    if (!known || ggml_quantize_requires_imatrix(type)) {
        throw std::invalid_argument("ggml type " + std::to_string(type) + " is none that rows can be converted to");
    }
    if (n_per_row < 1 || n_per_row % ggml_blck_size(type) != 0) {
        throw std::invalid_argument("rows of " + std::to_string(n_per_row) + " values are no whole blocks of " +
                                    ggml_type_name(type));
    }
    return ggml_row_size(type, n_per_row);
}

void quantize_rows(ggml_type type, const float * values, int64_t n_rows, int64_t n_per_row, const float * importance,
                   int n_threads, void * out) {
    const int64_t                  n_parts = std::clamp<int64_t>(n_threads, 1, std::max<int64_t>(n_rows, 1));
    std::vector<std::future<void>> parts;
    for (int64_t i = 0; i < n_parts; i++) {
        parts.push_back(std::async(std::launch::async, quantize_part, type, values, n_rows * i / n_parts,
                                   n_rows * (i + 1) / n_parts, n_per_row, importance, out));
    }
    for (std::future<void> & part : parts) {
        part.get();
    }
}

}  // namespace omnivlm
