// Rows of floats -> rows of one of ggml's types.

#pragma once

#include "ggml.h"

#include <cstdint>

namespace omnivlm {

// Bytes of a row of `n_per_row` values. Throws std::invalid_argument for a type that rows
// cannot be converted to, and for a row that the type's blocks do not divide.
size_t quantized_row_size(ggml_type type, int64_t n_per_row);

// Fills n_rows * quantized_row_size() bytes of `out`; the rows are shared out among `n_threads` threads.
// `importance` (n_per_row values, or null) weighs the squared error of each column: with it, ggml looks for
// the scales of least error instead of taking the first that fit.
// Throws std::range_error for a value that is not finite or too large for the types' F16 scales.
void quantize_rows(ggml_type type, const float * values, int64_t n_rows, int64_t n_per_row, const float * importance,
                   int n_threads, void * out);

}  // namespace omnivlm
