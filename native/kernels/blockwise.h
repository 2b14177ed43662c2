// Products with weights of 4 or 8 bits, once for all instruction sets with the dot product of tile.h.
//
// Dot provides, beyond tile.h: SIGNED_WEIGHTS; `lookup`, the codebook for `unpack`, which makes bytes of two values
// each into the codebook's for the lower and the upper ones; `load_halves`, FP16 -> float; `load_sums` and `splat` into
// a Vector; `add_scaled`, sum + float(dots) * (scale * factor); `subtract_scaled`, sum - minimum * factor.

#pragma once

#include "tile.h"

namespace omnivlm {
namespace {

template <class Dot> struct Blockwise {
    static constexpr int LANES = Dot::BYTES / 4;
    static constexpr int NV    = BLOCKWISE_COLUMNS / LANES;  // vectors of a panel's columns
    static constexpr int STEPS = BLOCKWISE_BLOCK / 4;

    using Vector  = typename Dot::Vector;
    using Operand = typename Dot::Operand;

    using Eight     = float __attribute__((vector_size(32)));
    using EightInts = int32_t __attribute__((vector_size(32)));

    // What a block of the rows looks like.
    struct Rows {
        char *    values;  // [n_rows][32]
        float *   scale;
        int32_t * start;
        float *   sum;
    };

    OMNIVLM_ALWAYS_INLINE static Rows rows_of(const BlockwiseTask & task, int64_t block) {
        char * values = task.rows + block * blockwise_rows_bytes(task.n_rows);
        auto * scale  = reinterpret_cast<float *>(values + task.n_rows * BLOCKWISE_BLOCK);
        auto * start  = reinterpret_cast<int32_t *>(scale + task.n_rows);
        return { values, scale, start, reinterpret_cast<float *>(start + task.n_rows) };
    }

    static void write_row(const BlockwiseTask & task, const float * x, int64_t r) {
        for (int64_t b = 0; b < task.n_blocks; b++, x += BLOCKWISE_BLOCK) {
            Eight most   = {};
            Eight poison = {};  // NaN if any value is no number
            for (int i = 0; i < BLOCKWISE_BLOCK; i += 8) {
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
            auto *      q       = reinterpret_cast<int8_t *>(rows.values) + r * BLOCKWISE_BLOCK;
            int32_t     sum     = 0;
            for (int i = 0; i < BLOCKWISE_BLOCK; i++) {
                const auto value = static_cast<int32_t>(__builtin_rintf(nothing == 0.0F ? x[i] * inverse : 0.0F));
                q[i]             = static_cast<int8_t>(value);
                sum += value;
            }
            rows.scale[r] = scale;
            rows.start[r] = -task.zero * sum;
            rows.sum[r]   = scale * static_cast<float>(sum);
        }
    }

    // A block's weights, and the scales of its columns.
    struct Block {
        Operand weights[STEPS][NV];
        Vector  scale[NV];
        Vector  minimum[NV];
    };

    template <Blocks BLOCKS> OMNIVLM_ALWAYS_INLINE static Block load_block(const char * panel, Operand codebook) {
        Block         block;
        constexpr int N = BLOCKS == Blocks::EIGHT ? STEPS : STEPS / 2;
#pragma GCC unroll 16
        for (int s = 0; s < N; s++) {
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                const Operand bytes = Dot::load(panel + (s * NV + v) * Dot::BYTES);
                if (BLOCKS == Blocks::EIGHT) {
                    block.weights[s][v] = bytes;
                } else {
                    Dot::unpack(bytes, codebook, block.weights[s][v], block.weights[s + STEPS / 2][v]);
                }
            }
        }
        const char * scales = panel + blockwise_value_bytes(BLOCKS);
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            block.scale[v] = Dot::load_halves(scales + v * LANES * 2);
            if (BLOCKS == Blocks::FOUR_WITH_MINIMUM) {
                block.minimum[v] = Dot::load_halves(scales + (BLOCKWISE_COLUMNS + v * LANES) * 2);
            }
        }
        return block;
    }

    // Adds one row's products with a block to its sums.
    template <Blocks BLOCKS>
    OMNIVLM_ALWAYS_INLINE static void add(const Block & block, const Rows & rows, int64_t r, Vector (&sums)[NV]) {
        const char * values = rows.values + r * BLOCKWISE_BLOCK;
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
            if (BLOCKS == Blocks::FOUR_WITH_MINIMUM) {
                sums[v] = Dot::subtract_scaled(sums[v], block.minimum[v], rows.sum[r]);
            }
        }
    }

    template <Blocks BLOCKS>
    OMNIVLM_LEAF static void one_row(const BlockwiseTask & task, const char * panel, float * out) {
        const Operand codebook = Dot::lookup(task.codebook);
        Vector        sums[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            sums[v] = Dot::zero();
        }
        for (int64_t b = 0; b < task.n_blocks; b++) {
            const Block block = load_block<BLOCKS>(panel, codebook);
            add<BLOCKS>(block, rows_of(task, b), 0, sums);
            panel += blockwise_block_bytes(BLOCKS);
        }
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            Dot::store(reinterpret_cast<char *>(out + v * LANES), sums[v]);
        }
    }

    // Some rows; their sums lie in memory, [n][16].
    template <Blocks BLOCKS>
    OMNIVLM_LEAF static void some_rows(const BlockwiseTask & task, const char * panel, int64_t first, int64_t n,
                                       float * out) {
        const Operand codebook = Dot::lookup(task.codebook);
        for (int64_t b = 0; b < task.n_blocks; b++) {
            const Block block = load_block<BLOCKS>(panel, codebook);
            const Rows  rows  = rows_of(task, b);
            for (int64_t r = 0; r < n; r++) {
                auto * at = reinterpret_cast<char *>(out + r * BLOCKWISE_COLUMNS);
                Vector sums[NV];
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    sums[v] = Dot::load_sums(at + v * Dot::BYTES);
                }
                add<BLOCKS>(block, rows, first + r, sums);
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    Dot::store(at + v * Dot::BYTES, sums[v]);
                }
            }
            panel += blockwise_block_bytes(BLOCKS);
        }
    }

    template <Blocks BLOCKS> static void panel(const BlockwiseTask & task, int64_t index) {
        constexpr int64_t ROWS  = 64;  // whose sums stay in the first cache
        const char *      panel = task.panels + index * task.n_blocks * blockwise_block_bytes(BLOCKS);
        float *           out   = task.out + index * BLOCKWISE_COLUMNS;
        if (task.n_rows == 1) {
            one_row<BLOCKS>(task, panel, out);
            return;
        }
        alignas(64) float sums[ROWS * BLOCKWISE_COLUMNS];
        for (int64_t first = 0; first < task.n_rows; first += ROWS) {
            const int64_t n = task.n_rows - first < ROWS ? task.n_rows - first : ROWS;
            __builtin_memset(sums, 0, sizeof(float) * static_cast<size_t>(n) * BLOCKWISE_COLUMNS);
            some_rows<BLOCKS>(task, panel, first, n, sums);
            for (int64_t r = 0; r < n; r++) {
                __builtin_memcpy(out + (first + r) * task.n_out, sums + r * BLOCKWISE_COLUMNS,
                                 sizeof(float) * BLOCKWISE_COLUMNS);
            }
        }
    }

    static void linear(const BlockwiseTask & task, int64_t panel_begin, int64_t panel_end) {
        for (int64_t p = panel_begin; p < panel_end; p++) {
            switch (task.blocks) {
            case Blocks::FOUR:
                panel<Blocks::FOUR>(task, p);
                break;
            case Blocks::FOUR_WITH_MINIMUM:
                panel<Blocks::FOUR_WITH_MINIMUM>(task, p);
                break;
            case Blocks::EIGHT:
                panel<Blocks::EIGHT>(task, p);
                break;
            }
        }
    }

    static constexpr BlockwiseKernels table() { return { Dot::SIGNED_WEIGHTS, write_row, linear }; }
};

}  // namespace
}  // namespace omnivlm
