// What this machine's instructions can do at most, to read measured rates against.

#pragma once

#include "vision-kernels.h"

namespace omnivlm {

// 1e9 operations a second (a multiplication and an addition are two) of the instructions that the kernels of a
// precision multiply the tower's matrices with, on `n_threads` threads at once. 0 for Precision::GGML.
double peak_gops(Precision precision, int n_threads);

}  // namespace omnivlm
