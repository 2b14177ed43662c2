// What each instruction set's source file defines.

#pragma once

#include "kernel.h"

namespace omnivlm {

extern const Kernels AVX512_VNNI;
extern const Kernels AVX512;
extern const Kernels AVX_VNNI;
extern const Kernels AVX2;
extern const Kernels NEON_I8MM;
extern const Kernels NEON_DOTPROD;
extern const Kernels PORTABLE;

}  // namespace omnivlm
