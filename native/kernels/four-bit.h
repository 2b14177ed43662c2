// Products with 4-bit weights, once for all instruction sets with the dot product of tile.h.
//
// Dot provides, beyond tile.h: SIGNED_WEIGHTS; `lookup`, the codebook for `unpack`, which makes bytes of two values
// each into the codebook's for the lower and the upper ones; `load_halves`, FP16 -> float; `load_sums` and `splat` into
// a Vector; `add_scaled`, sum + float(dots) * (scale * factor); `subtract_scaled`, sum - minimum * factor.

#pragma once

#include "tile.h"

namespace omnivlm {
namespace {

template <class Dot> struct FourBit {
    static constexpr int LANES = Dot::BYTES / 4;
    static constexpr int NV    = FOUR_BIT_COLUMNS / LANES;  // vectors of a panel's columns
    static constexpr int STEPS = FOUR_BIT_BLOCK / 4;

    using Vector  = typename Dot::Vector;
    using Operand = typename Dot::Operand;

    using Eight     = float __attribute__((vector_size(32)));
    using EightInts = int32_t __attribute__((vector_size(32)));

    // What a block of the rows looks like.
    struct Rows {
        const char *    values;  // [n_rows][32]
        const float *   scale;
        const int32_t * start;
        const float *   sum;
    };

    OMNIVLM_ALWAYS_INLINE static Rows rows_of(const FourBitTask & task, int64_t block) {
        const char * values = task.rows + block * four_bit_rows_bytes(task.n_rows);
        const auto * scale  = reinterpret_cast<const float *>(values + task.n_rows * FOUR_BIT_BLOCK);
        const auto * start  = reinterpret_cast<const int32_t *>(scale + task.n_rows);
        return { values, scale, start, reinterpret_cast<const float *>(start + task.n_rows) };
    }

    static void write_row(const FourBitTask & task, const float * x, int64_t r) {
        for (int64_t b = 0; b < task.n_blocks; b++, x += FOUR_BIT_BLOCK) {
            Eight most   = {};
            Eight poison = {};  // NaN if any value is no number
            for (int i = 0; i < FOUR_BIT_BLOCK; i += 8) {
                Eight values;
                __builtin_memcpy(&values, x + i, sizeof(values));
                const auto size = (Eight)((EightInts)values & 0x7fffffff);
                most            = size > most ? size : most;
                poison += values * 0.0F;
            }
            float largest = 0.0F;
            float nothing = 0.0F;
            for (int lane = 0; lane < 8; lane++) {
                largest = most[lane] > largest ? most[lane] : largest;
                nothing += poison[lane];
            }
            const float scale   = largest / 127.0F + nothing;
            const float inverse = largest > 0.0F && nothing == 0.0F ? 127.0F / largest : 0.0F;
            const Rows  rows    = rows_of(task, b);
            auto *      q       = reinterpret_cast<int8_t *>(const_cast<char *>(rows.values)) + r * FOUR_BIT_BLOCK;
            int32_t     sum     = 0;
            for (int i = 0; i < FOUR_BIT_BLOCK; i++) {
                const auto value = static_cast<int32_t>(__builtin_rintf(nothing == 0.0F ? x[i] * inverse : 0.0F));
                q[i]             = static_cast<int8_t>(value);
                sum += value;
            }
            const_cast<float *>(rows.scale)[r]   = scale;
            const_cast<int32_t *>(rows.start)[r] = -task.zero * sum;
            const_cast<float *>(rows.sum)[r]     = scale * static_cast<float>(sum);
        }
    }

    // A block's weights, and the scales of its columns.
    struct Block {
        Operand weights[STEPS][NV];
        Vector  scale[NV];
        Vector  minimum[NV];
    };

    template <bool MINIMUM> OMNIVLM_ALWAYS_INLINE static Block load_block(const char * panel, Operand codebook) {
        Block block;
#pragma GCC unroll 16
        for (int s = 0; s < STEPS / 2; s++) {
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                const Operand bytes = Dot::load(panel + (s * NV + v) * Dot::BYTES);
                Dot::unpack(bytes, codebook, block.weights[s][v], block.weights[s + STEPS / 2][v]);
            }
        }
        const char * scales = panel + FOUR_BIT_COLUMNS * FOUR_BIT_BLOCK / 2;
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            block.scale[v] = Dot::load_halves(scales + v * LANES * 2);
            if (MINIMUM) {
                block.minimum[v] = Dot::load_halves(scales + (FOUR_BIT_COLUMNS + v * LANES) * 2);
            }
        }
        return block;
    }

    // Adds one row's products with a block to its sums.
    template <bool MINIMUM>
    OMNIVLM_ALWAYS_INLINE static void add(const Block & block, const Rows & rows, int64_t r, Vector (&sums)[NV]) {
        const char * values = rows.values + r * FOUR_BIT_BLOCK;
        Vector       dots[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            dots[v] = Dot::splat(rows.start[r]);
        }
#pragma GCC unroll 16
        for (int s = 0; s < STEPS; s++) {
            const Operand x = Dot::broadcast(values + 4 * s);
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                dots[v] = Dot::dot(dots[v], block.weights[s][v], x);
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            sums[v] = Dot::add_scaled(sums[v], dots[v], block.scale[v], rows.scale[r]);
            if (MINIMUM) {
                sums[v] = Dot::subtract_scaled(sums[v], block.minimum[v], rows.sum[r]);
            }
        }
    }

    template <bool MINIMUM>
    OMNIVLM_LEAF static void one_row(const FourBitTask & task, const char * panel, float * out) {
        const Operand codebook = Dot::lookup(task.codebook);
        Vector        sums[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            sums[v] = Dot::zero();
        }
        for (int64_t b = 0; b < task.n_blocks; b++) {
            const Block block = load_block<MINIMUM>(panel, codebook);
            add<MINIMUM>(block, rows_of(task, b), 0, sums);
            panel += four_bit_block_bytes(MINIMUM);
        }
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            Dot::store(reinterpret_cast<char *>(out + v * LANES), sums[v]);
        }
    }

    // Some rows; their sums lie in memory, [n][16].
    template <bool MINIMUM>
    OMNIVLM_LEAF static void some_rows(const FourBitTask & task, const char * panel, int64_t first, int64_t n,
                                       float * out) {
        const Operand codebook = Dot::lookup(task.codebook);
        for (int64_t b = 0; b < task.n_blocks; b++) {
            const Block block = load_block<MINIMUM>(panel, codebook);
            const Rows  rows  = rows_of(task, b);
            for (int64_t r = 0; r < n; r++) {
                auto * at = reinterpret_cast<char *>(out + r * FOUR_BIT_COLUMNS);
                Vector sums[NV];
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    sums[v] = Dot::load_sums(at + v * Dot::BYTES);
                }
                add<MINIMUM>(block, rows, first + r, sums);
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    Dot::store(at + v * Dot::BYTES, sums[v]);
                }
            }
            panel += four_bit_block_bytes(MINIMUM);
        }
    }

    template <bool MINIMUM> static void panel(const FourBitTask & task, int64_t index) {
        constexpr int64_t ROWS  = 64;  // whose sums stay in the first cache
        const char *      panel = task.panels + index * task.n_blocks * four_bit_block_bytes(MINIMUM);
        float *           out   = task.out + index * FOUR_BIT_COLUMNS;
        if (task.n_rows == 1) {
            one_row<MINIMUM>(task, panel, out);
            return;
        }
        alignas(64) float sums[ROWS * FOUR_BIT_COLUMNS];
        for (int64_t first = 0; first < task.n_rows; first += ROWS) {
            const int64_t n = task.n_rows - first < ROWS ? task.n_rows - first : ROWS;
            __builtin_memset(sums, 0, sizeof(float) * static_cast<size_t>(n) * FOUR_BIT_COLUMNS);
            some_rows<MINIMUM>(task, panel, first, n, sums);
            for (int64_t r = 0; r < n; r++) {
                __builtin_memcpy(out + (first + r) * task.n_out, sums + r * FOUR_BIT_COLUMNS,
                                 sizeof(float) * FOUR_BIT_COLUMNS);
            }
        }
    }

    static void linear(const FourBitTask & task, int64_t panel_begin, int64_t panel_end) {
        for (int64_t p = panel_begin; p < panel_end; p++) {
            if (task.has_minimum) {
                panel<true>(task, p);
            } else {
                panel<false>(task, p);
            }
        }
    }

    static constexpr FourBitKernels table() { return { Dot::SIGNED_WEIGHTS, write_row, linear }; }
};

}  // namespace
}  // namespace omnivlm
