// The micro-kernel, once for all instruction sets whose dot product has the form
//
//   acc[r][j] += a[r] . b[j]     a: 4 bytes of a row, broadcast;  b: 4 bytes in each 32-bit lane
//
// Dot provides: Vector, Operand, BYTES of both, KP, load, broadcast, zero, dot, store, and OPS, the operations of one
// dot.

#pragma once

#include "kernel.h"

namespace omnivlm {
namespace {

// A leaf that is neither inlined nor cloned: GCC 12 keeps the accumulators in registers only then (twice the speed).
#if defined(__clang__)
#define OMNIVLM_LEAF __attribute__((noinline))
#else
#define OMNIVLM_LEAF __attribute__((noinline, noclone))
#endif

#if defined(__aarch64__)
#define OMNIVLM_VECTOR_REGISTER "+w"
#elif defined(__x86_64__)
#define OMNIVLM_VECTOR_REGISTER "+v"
#else
#define OMNIVLM_VECTOR_REGISTER "+m"
#endif

template <class Dot, int MR, int NV>
OMNIVLM_LEAF void tile(const char * rows, size_t row_bytes, const char * panel, int64_t n_steps, void * out) {
    using Vector = typename Dot::Vector;
    Vector acc[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            acc[r][v] = Dot::zero();
        }
    }
    for (int64_t s = 0; s < n_steps; s++) {
        typename Dot::Operand b[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            b[v] = Dot::load(panel + v * Dot::BYTES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            const typename Dot::Operand a = Dot::broadcast(rows + static_cast<size_t>(r) * row_bytes);
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                acc[r][v] = Dot::dot(acc[r][v], a, b[v]);
            }
        }
        rows += 4;
        panel += NV * Dot::BYTES;
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            Dot::store(static_cast<char *>(out) + (r * NV + v) * Dot::BYTES, acc[r][v]);
        }
    }
}

// `n` rounds of MR * NV dots, operands and sums in registers.
template <class Dot, int MR, int NV> OMNIVLM_LEAF double peak(int64_t n) {
    alignas(64) char      zeros[Dot::BYTES] = {};
    typename Dot::Operand a                 = Dot::broadcast(zeros);
    typename Dot::Operand b                 = Dot::load(zeros);
    typename Dot::Vector  acc[MR * NV];
#pragma GCC unroll 64
    for (int i = 0; i < MR * NV; i++) {
        acc[i] = Dot::zero();
    }
    // The compiler cannot tell what this leaves in the registers.
    __asm__ volatile("" : OMNIVLM_VECTOR_REGISTER(a));
    for (int64_t s = 0; s < n; s++) {
#pragma GCC unroll 64
        for (int i = 0; i < MR * NV; i++) {
            __asm__ volatile("" : OMNIVLM_VECTOR_REGISTER(b));
            acc[i] = Dot::dot(acc[i], a, b);
            __asm__ volatile("" : OMNIVLM_VECTOR_REGISTER(acc[i]));
        }
    }
    return static_cast<double>(n) * MR * NV * Dot::OPS;
}

template <class Dot, int MR, int NV> constexpr MicroKernel micro_kernel() {
    return { MR, NV * Dot::BYTES / 4, Dot::KP, tile<Dot, MR, NV>, peak<Dot, MR, NV> };
}

}  // namespace
}  // namespace omnivlm
