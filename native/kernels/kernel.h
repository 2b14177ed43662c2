// The matrix products of the vision tower on a CPU: what an instruction set's source file provides, and how
// operands lie in memory. Knows nothing of ggml, files or models.
//
// A product y = x w^T + b multiplies rows of activations with panels of weights. A micro-kernel computes one tile of
// `mr` rows by `nr` columns. In each of its steps it takes the next `kp` values of each row and the next
// [nr][kp] values of the panel, so that both are read in the order in which they lie.
//
// INT8 operands stand for  scale * q + offset  (rows) and  scale * q  (panels), with a scale for each block
// of `block` values along the inner dimension; the offset, what q = 0 stands for, costs one more multiplication
// with the panel's sums. BF16 and F32 operands have no scales.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace omnivlm {

#define OMNIVLM_ALWAYS_INLINE __attribute__((always_inline)) inline

enum class Operand { INT8, BF16, F32 };
constexpr int N_OPERANDS = 3;

enum class Epilogue { NONE, GELU_TANH, GELU_ERF, RESIDUAL };

struct MicroKernel {
    int mr;  // rows of a tile
    int nr;  // columns of a tile, a multiple of 16
    int kp;  // inner values of a step
    // Rows start `row_bytes` behind each other. Writes [mr][nr] int32 (INT8) or float.
    void (*run)(const char * rows, size_t row_bytes, const char * panel, int64_t n_steps, void * tile);
    // Does nothing but multiply and add, in registers, in `n` rounds; returns the operations done.
    double (*peak)(int64_t n);
};

// How the inner dimension of one product's operands is laid out for one micro-kernel.
struct Packing {
    Operand operand;
    int     mr, nr, kp;
    int64_t n_in;      // values that count
    int64_t block;     // values that share a scale; a multiple of kp
    int64_t n_blocks;  // n_in is padded with zeros to block * n_blocks

    // Always inlined, because files for different instruction sets must not share a copy.
    OMNIVLM_ALWAYS_INLINE int64_t n_padded() const { return block * n_blocks; }
    OMNIVLM_ALWAYS_INLINE int64_t value_bytes() const {
        return operand == Operand::INT8 ? 1 : operand == Operand::BF16 ? 2 : 4;
    }

    // A row: values, and for INT8 float scale[n_blocks], offset[n_blocks].
    size_t row_values_bytes() const;
    size_t row_bytes() const;

    // A panel: values [steps][nr][kp], and for INT8 float scale[n_blocks][nr], scaled sum[n_blocks][nr].
    size_t panel_values_bytes() const;
    size_t panel_bytes() const;
    size_t panel_scratch_bytes() const;
};

// Weights and biases of a layer norm, [n_in] each.
struct NormWeights {
    const float * weight;
    const float * bias;
    float         eps;
};

struct LinearTask {
    Packing       packing;
    const char *  rows;      // [n_rows, padded to a multiple of mr][row_bytes]
    const char *  panels;    // [panels][panel_bytes]
    const float * bias;      // [n_out]
    const float * residual;  // [n_rows][n_out], for RESIDUAL
    float *       out;       // [n_rows][n_out]
    int64_t       n_rows;
    int64_t       n_out;
    Epilogue      epilogue;
};

// Full attention of one head of one picture; q, k, v and out are [n_tokens][stride], the head's columns first.
struct AttentionTask {
    Operand       operand;
    const float * q;
    const float * k;
    const float * v;
    float *       out;
    int64_t       n_tokens;
    int64_t       d_head;
    int64_t       stride;
    float         scale;  // of the products before softmax
};

// Weights of 4 or 8 bits, as a text model has them. 32 values along the inner dimension, a block, share a scale: of 8
// bits they stand for scale * (q - zero), of 4 bits for scale * (codebook[q] - zero), less a minimum that the block has
// if the format has any.
enum class Blocks { FOUR, FOUR_WITH_MINIMUM, EIGHT };

// A panel holds 16 columns; for each block: its values, FP16 scale[16] and, if any, FP16 minimum[16].
// Of 8 bits, byte [s][j][i], s < 8, j < 16, i < 4, is column j's value 4 s + i. Of 4 bits, byte [s][j][i], s < 4, is
// its value 4 s + i in the lower half, 16 + 4 s + i in the upper one. Rows of activations lie block by block, too: int8
// q[n_rows][32], then for each row a float scale, an int32 that the sum of products starts at, for `zero`, and a float
// sum of scale * q, for the minimum.
struct BlockwiseTask {
    const char *    panels;
    char *          rows;  // 64-byte aligned
    float *         out;   // [n_rows][n_out]
    int64_t         n_rows;
    int64_t         n_out;     // a multiple of 16
    int64_t         n_blocks;  // of 32
    const uint8_t * codebook;  // [16]
    int             zero;
    Blocks          blocks;
};

constexpr int     BLOCKWISE_COLUMNS = 16;
constexpr int64_t BLOCKWISE_BLOCK   = 32;

OMNIVLM_ALWAYS_INLINE int64_t blockwise_value_bytes(Blocks blocks) {
    return BLOCKWISE_COLUMNS * BLOCKWISE_BLOCK / (blocks == Blocks::EIGHT ? 1 : 2);
}

OMNIVLM_ALWAYS_INLINE int64_t blockwise_block_bytes(Blocks blocks) {
    return blockwise_value_bytes(blocks) + BLOCKWISE_COLUMNS * (blocks == Blocks::FOUR_WITH_MINIMUM ? 4 : 2);
}

OMNIVLM_ALWAYS_INLINE int64_t blockwise_rows_bytes(int64_t n_rows) {  // of a block
    return (n_rows * (BLOCKWISE_BLOCK + 12) + 63) / 64 * 64;
}

// How an instruction set multiplies with such weights. A row's result does not depend on the others' number.
struct BlockwiseKernels {
    bool is_signed;  // takes values less `zero`, and a zero of 0

    // x [n_blocks * 32] -> row `r` of task.rows.
    void (*write_row)(const BlockwiseTask & task, const float * x, int64_t r);

    // The columns of the panels from `panel_begin` to `panel_end`.
    void (*linear)(const BlockwiseTask & task, int64_t panel_begin, int64_t panel_end);
};

// Attention of a text model to the cells of its key-value cache, of which each query sees some. Several
// query heads share a head of keys and values. Strides are in bytes.
struct CachedAttentionTask {
    const char * q;  // float
    size_t       q_row, q_head;
    const char * k;  // FP16
    size_t       k_cell, k_head;
    const char * v;  // FP16
    size_t       v_cell, v_head;
    const char * mask;  // FP16, minus infinity where a query does not see a cell, else 0
    size_t       mask_row;
    float *      out;  // [n_queries][n_heads][d]
    int64_t      n_heads, n_heads_kv, n_cells, d;
    float        scale;  // of the products before softmax
};

struct CachedAttentionKernels {
    bool (*takes)(const CachedAttentionTask & task);  // whether the shapes are such that `run` can
    size_t (*scratch_bytes)(const CachedAttentionTask & task);

    // One query's heads that share one head of keys and values. `scratch` is a thread's own, 64-byte aligned.
    void (*run)(const CachedAttentionTask & task, int64_t query, int64_t head_kv, char * scratch);
};

// All of one instruction set. Functions are reentrant; `scratch` is a thread's own, 64-byte aligned.
struct Kernels {
    const char * name;
    bool (*supported)();  // by this machine
    MicroKernel micro[N_OPERANDS];

    // x [n_in] -> one row of activations; normalised first, if `norm` is not null. scratch: n_padded floats.
    void (*write_row)(const Packing & packing, const float * x, const NormWeights * norm, float * scratch, char * row);

    // Rows [n_valid <= nr][n_in], `stride` floats apart -> one panel. scratch: packing.panel_scratch_bytes().
    void (*write_panel)(const Packing & packing, const float * rows, int64_t stride, int n_valid, char * scratch,
                        char * panel);

    // One panel's columns of the rows from `row_begin` (a multiple of mr) to `row_end`.
    void (*linear)(const LinearTask & task, int64_t panel, int64_t row_begin, int64_t row_end);

    // The queries from `query_begin` to `query_end`.
    void (*attention)(const AttentionTask & task, int64_t query_begin, int64_t query_end, char * scratch);
    size_t (*attention_scratch_bytes)(const AttentionTask & task);

    // Null pointers where there are none.
    BlockwiseKernels       blockwise;
    CachedAttentionKernels cached_attention;

    Packing packing(Operand operand, int64_t n_in, int64_t block) const;  // `block` 0: one for all values
};

// Every instruction set that this build has code for, the quickest first; the portable one is the last.
const std::vector<const Kernels *> & all_kernels();

// The quickest that this machine supports.
const Kernels & best_kernels();

}  // namespace omnivlm
