// Everything around the micro-kernels, written once and compiled in each instruction set's source file with its own
// compiler flags. Nothing in here may be visible outside that file, and nothing from the standard library that
// the linker might share with other files may be called: it would carry instructions that the machine lacks.
//
// Isa provides:  INT8_MAX_ROW      largest quantised activation: 255, or 127 where products would saturate
//                INT8_ROW_BIAS     128 where the instruction wants signed activations, else 0
//                kernels of MicroKernel type: int8(), bf16(), f32()

#pragma once

#include "kernel.h"

namespace omnivlm {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints   = int32_t __attribute__((vector_size(4 * LANES)));
using Words  = uint32_t __attribute__((vector_size(4 * LANES)));
using Bytes  = uint8_t __attribute__((vector_size(LANES)));

#define OMNIVLM_INLINE static inline __attribute__((always_inline))

OMNIVLM_INLINE Floats load(const float * p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

OMNIVLM_INLINE Ints load(const int32_t * p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class Vector> OMNIVLM_INLINE void store(void * p, const Vector & v) {
    __builtin_memcpy(p, &v, sizeof v);
}

OMNIVLM_INLINE Floats splat(float x) {
    return Floats{} + x;
}

template <class To, class From> OMNIVLM_INLINE To bits(const From & from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// The comparisons keep a NaN in `a`.
OMNIVLM_INLINE Floats at_least(Floats a, Floats least) {
    return a < least ? least : a;
}

OMNIVLM_INLINE Floats at_most(Floats a, Floats most) {
    return a > most ? most : a;
}

OMNIVLM_INLINE Floats abs(Floats a) {
    return bits<Floats>(bits<Words>(a) & 0x7fffffffU);
}

template <class Combine> OMNIVLM_INLINE float reduce(Floats v, Combine combine) {
    float lanes[LANES];
    store(lanes, v);
    float result = lanes[0];
    for (int i = 1; i < LANES; i++) {
        result = combine(result, lanes[i]);
    }
    return result;
}

OMNIVLM_INLINE float sum_of(Floats v) {
    return reduce(v, [](float a, float b) { return a + b; });
}

OMNIVLM_INLINE float smallest_of(Floats v) {
    return reduce(v, [](float a, float b) { return a < b ? a : b; });
}

OMNIVLM_INLINE float largest_of(Floats v) {
    return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

// Without their fraction. Unsigned, so that what a NaN becomes may overflow.
OMNIVLM_INLINE Words whole(Floats a) {
    return bits<Words>(__builtin_convertvector(a, Ints));
}

OMNIVLM_INLINE int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// 2^t; a NaN stays one. Taylor series around the nearest whole number: relative error below 3e-7.
OMNIVLM_INLINE Floats exp2(Floats t) {
    constexpr float TO_WHOLE = 12582912.0F;  // 1.5 * 2^23: adding it leaves no fraction bits
    t                        = at_most(at_least(t, splat(-126.0F)), splat(126.0F));
    const Floats whole       = (t + TO_WHOLE) - TO_WHOLE;
    const Floats f           = t - whole;
    Floats       p           = splat(1.5403530e-4F);
    p                        = p * f + 1.3333558e-3F;
    p                        = p * f + 9.6181291e-3F;
    p                        = p * f + 5.5504109e-2F;
    p                        = p * f + 2.4022651e-1F;
    p                        = p * f + 6.9314718e-1F;
    p                        = p * f + 1.0F;
    return p * bits<Floats>((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// For results that are rounded to 8 bits: relative error below 1e-4, t at most 126.
OMNIVLM_INLINE Floats exp2_rough(Floats t) {
    constexpr float TO_WHOLE = 12582912.0F;
    t                        = t < -126.0F ? splat(-126.0F) : t;
    const Floats shifted     = t + TO_WHOLE;
    const Floats f           = t - (shifted - TO_WHOLE);
    Floats       p           = splat(5.5171e-2F);
    p                        = p * f + 2.4261e-1F;
    p                        = p * f + 6.9326e-1F;
    p                        = p * f + 9.9993e-1F;
    return bits<Floats>(bits<Words>(p) + (bits<Words>(shifted) << 23));  // the whole part is in its lowest bits
}

constexpr float LOG2_E = 1.44269504F;

// x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2  =  x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
OMNIVLM_INLINE Floats gelu_tanh(Floats x) {
    constexpr float C = -2.0F * 0.79788456F * LOG2_E;
    return x / (exp2(C * x * (0.044715F * x * x + 1.0F)) + 1.0F);
}

// The same for results that are rounded to 8 bits: relative error below 4e-4.
OMNIVLM_INLINE Floats gelu_tanh_rough(Floats x) {
    constexpr float C = -2.0F * 0.79788456F * LOG2_E;
    const Floats    t = C * x * (0.044715F * x * x + 1.0F);
    const Floats    d = exp2_rough(t > 80.0F ? splat(80.0F) : t) + 1.0F;
    // 1 / d: a guess from the exponent, then two of Newton's steps (the first with its error balanced).
    Floats r = bits<Floats>(0x7ef127eaU - bits<Words>(d));
    r        = r * (2.0F - d * r);
    r        = r * (2.0F - d * r);
    return x * r;
}

// x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26: absolute error below 2e-7.
OMNIVLM_INLINE Floats gelu_erf(Floats x) {
    const Floats z    = abs(x) * 0.70710678F;
    const Floats t    = 1.0F / (z * 0.3275911F + 1.0F);
    Floats       p    = splat(1.061405429F);
    p                 = p * t - 1.453152027F;
    p                 = p * t + 1.421413741F;
    p                 = p * t - 0.284496736F;
    p                 = p * t + 0.254829592F;
    const Floats tail = 0.5F * p * t * exp2(z * z * -LOG2_E);  // (1 - erf(z)) / 2
    return x * (x < 0.0F ? tail : 1.0F - tail);
}

// To the nearest, ties to even; NaNs become one that no carry can turn into a number. In the upper half of each word.
OMNIVLM_INLINE Words to_bf16(Floats x) {
    const Words b       = bits<Words>(x);
    const Words rounded = b + 0x7fffU + ((b >> 16) & 1U);
    return (x == x ? rounded : Words{} + 0x7fc00000U) & 0xffff0000U;
}

OMNIVLM_INLINE Floats load_part(const float * x, int64_t n) {
    Floats v = splat(x[0]);
    __builtin_memcpy(&v, x, static_cast<size_t>(n) * sizeof(float));
    return v;
}

// Vectors of the n values of x and how many of their lanes count. The last one overlaps the one before, so that all of
// its lanes do; only a row shorter than a vector repeats its first value. `each` must bear to see a value twice.
template <class Each> OMNIVLM_INLINE void for_vectors(const float * x, int64_t n, Each each) {
    if (n < LANES) {
        if (n > 0) {
            each(int64_t{ 0 }, load_part(x, n), n);
        }
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        each(i, load(x + i), int64_t{ LANES });
    }
    if (i < n) {
        each(n - LANES, load(x + n - LANES), int64_t{ LANES });
    }
}

// The first n lanes of `v`.
template <class Vector> OMNIVLM_INLINE void store_part(void * p, const Vector & v, int64_t n) {
    if (n == LANES) {
        store(p, v);
    } else {
        __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof v / LANES);
    }
}

template <class Isa> struct Loops {
    static constexpr MicroKernel micro(Operand operand) {
        return operand == Operand::INT8 ? Isa::int8() : operand == Operand::BF16 ? Isa::bf16() : Isa::f32();
    }

    // ---- rows of activations -------------------------------------------------------------------

    static void write_row(const Packing & p, const float * x, const NormWeights * norm, float * scratch, char * row) {
        if (norm != nullptr) {
            layer_norm(x, p.n_in, *norm, scratch);
            x = scratch;
        }
        if (p.operand == Operand::INT8) {
            write_int8_row(p, x, row);
        } else {
            write_float_row(p, x, row);
        }
    }

    static void layer_norm(const float * x, int64_t n, const NormWeights & norm, float * y) {
        const int64_t whole = n / LANES * LANES;
        Floats        sums  = {};
        float         rest  = 0.0F;
        for (int64_t i = 0; i < whole; i += LANES) {
            sums += load(x + i);
        }
        for (int64_t i = whole; i < n; i++) {
            rest += x[i];
        }
        const float mean = (sum_of(sums) + rest) / static_cast<float>(n);
        sums             = Floats{};
        rest             = 0.0F;
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats d = load(x + i) - mean;
            sums += d * d;
        }
        for (int64_t i = whole; i < n; i++) {
            rest += (x[i] - mean) * (x[i] - mean);
        }
        const float deviation = __builtin_sqrtf((sum_of(sums) + rest) / static_cast<float>(n) + norm.eps);
        const float factor    = 1.0F / deviation;
        for (int64_t i = 0; i < whole; i += LANES) {
            store(y + i, (load(x + i) - mean) * factor * load(norm.weight + i) + load(norm.bias + i));
        }
        for (int64_t i = whole; i < n; i++) {
            y[i] = (x[i] - mean) * factor * norm.weight[i] + norm.bias[i];
        }
    }

    static void write_float_row(const Packing & p, const float * x, char * row) {
        const int64_t size = p.value_bytes();
        for_vectors(x, p.n_in, [&](int64_t i, Floats v, int64_t n) {
            if (p.operand == Operand::BF16) {
                using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
                store_part(row + i * size, __builtin_convertvector(to_bf16(v) >> 16, Halves), n);
            } else {
                store_part(row + i * size, v, n);
            }
        });
        __builtin_memset(row + p.n_in * size, 0, static_cast<size_t>((p.n_padded() - p.n_in) * size));
    }

    static void write_int8_row(const Packing & p, const float * x, char * row) {
        auto *  scale  = reinterpret_cast<float *>(row + p.row_values_bytes());
        float * offset = scale + p.n_blocks;
        for (int64_t b = 0; b < p.n_blocks; b++) {
            const int64_t first = b * p.block;
            const int64_t left  = p.n_in - first < 0 ? 0 : p.n_in - first;
            const int64_t n     = left < p.block ? left : p.block;
            char *        out   = row + first;
            if (n == 0) {
                __builtin_memset(out, 0, static_cast<size_t>(p.block));
                scale[b] = offset[b] = 0.0F;
                continue;
            }
            Floats least  = splat(x[first]);
            Floats most   = least;
            Floats poison = {};  // becomes NaN by a NaN or an infinity, and stays 0 otherwise
            for_vectors(x + first, n, [&](int64_t, Floats v, int64_t) {
                least = v < least ? v : least;
                most  = v > most ? v : most;
                poison += v * 0.0F;
            });
            const float low   = smallest_of(least);
            const float range = largest_of(most) - low;
            const float step  = range / Isa::INT8_MAX_ROW;
            const float up    = range > 0.0F ? Isa::INT8_MAX_ROW / range : 0.0F;
            for_vectors(x + first, n, [&](int64_t i, Floats v, int64_t count) {
                const Floats quantised = at_most((v - low) * up + 0.5F, splat(Isa::INT8_MAX_ROW));
                store_part(out + i, __builtin_convertvector(whole(quantised) - Isa::INT8_ROW_BIAS, Bytes), count);
            });
            __builtin_memset(out + n, 0, static_cast<size_t>(p.block - n));
            scale[b]  = step + sum_of(poison);
            offset[b] = low + step * static_cast<float>(Isa::INT8_ROW_BIAS);
        }
    }

    // ---- panels of weights ---------------------------------------------------------------------

    static void write_panel(const Packing & p, const float * rows, int64_t stride, int n_valid, char * scratch,
                            char * panel) {
        const size_t row_bytes = p.row_values_bytes();
        auto *       scale     = reinterpret_cast<float *>(panel + p.panel_values_bytes());
        float *      sum       = scale + p.n_blocks * p.nr;
        for (int j = 0; j < p.nr; j++) {
            char *        row = scratch + static_cast<size_t>(j) * row_bytes;
            const float * x   = rows + (j < n_valid ? j : 0) * stride;
            if (j >= n_valid) {
                __builtin_memset(row, 0, row_bytes);
            } else if (p.operand != Operand::INT8) {
                write_float_row(p, x, row);
            }
            for (int64_t b = 0; b < p.n_blocks && p.operand == Operand::INT8; b++) {
                const int64_t first = b * p.block;
                const int64_t left  = p.n_in - first < 0 || j >= n_valid ? 0 : p.n_in - first;
                const int64_t n     = left < p.block ? left : p.block;
                write_int8_block(n > 0 ? x + first : x, n, p.block, row + first, scale[b * p.nr + j],
                                 sum[b * p.nr + j]);
            }
        }
        if (p.kp * p.value_bytes() == 4) {
            interleave<uint32_t>(p, scratch, panel);
        } else {
            interleave<uint64_t>(p, scratch, panel);
        }
    }

    // Rows [nr][words] -> [words][nr], some words of all rows at a time so that both stay in the first cache.
    template <class Word> static void interleave(const Packing & p, const char * rows, char * panel) {
        constexpr int64_t AT_ONCE   = 64 / sizeof(Word);
        const int64_t     n_words   = p.n_padded() / p.kp;
        const size_t      row_bytes = p.row_values_bytes();
        for (int64_t first = 0; first < n_words; first += AT_ONCE) {
            const int64_t last = first + AT_ONCE < n_words ? first + AT_ONCE : n_words;
            for (int64_t w = first; w < last; w++) {
                for (int64_t j = 0; j < p.nr; j++) {
                    __builtin_memcpy(panel + (w * p.nr + j) * static_cast<int64_t>(sizeof(Word)),
                                     rows + static_cast<size_t>(j) * row_bytes + static_cast<size_t>(w) * sizeof(Word),
                                     sizeof(Word));
                }
            }
        }
    }

    static void write_int8_block(const float * x, int64_t n, int64_t block, char * out, float & scale, float & sum) {
        Floats most   = {};
        Floats poison = {};
        for_vectors(x, n, [&](int64_t, Floats v, int64_t) {
            const Floats size = abs(v);
            most              = size > most ? size : most;
            poison += v * 0.0F;
        });
        const float largest = largest_of(most);
        const float up      = largest > 0.0F ? 127.0F / largest : 0.0F;
        for_vectors(x, n, [&](int64_t i, Floats v, int64_t count) {
            // Above 0 so that cutting the fraction off rounds to the nearest.
            const Floats above = at_least(at_most(v * up, splat(127.0F)), splat(-127.0F)) + 128.5F;
            store_part(out + i, __builtin_convertvector(whole(above) - 128U, Bytes), count);
        });
        __builtin_memset(out + n, 0, static_cast<size_t>(block - n));
        int32_t total = 0;
        for (int64_t i = 0; i < n; i++) {
            total += static_cast<signed char>(out[i]);
        }
        scale = largest / 127.0F + sum_of(poison);
        sum   = scale * static_cast<float>(total);
    }

    // ---- products ------------------------------------------------------------------------------

    static constexpr int64_t BLOCKS_AT_ONCE = 8;  // tiles of whole numbers that stay in the first cache

    // One tile of a product: `finish` is given each row and column with the value, scales applied.
    template <Operand OPERAND, class Finish>
    OMNIVLM_INLINE void product(const Packing & p, const char * rows, const char * panel, Finish finish) {
        constexpr MicroKernel KERNEL    = micro(OPERAND);
        constexpr int         SIZE      = KERNEL.mr * KERNEL.nr;
        const size_t          row_bytes = p.row_bytes();
        alignas(64) float     tile[SIZE];
        if (OPERAND != Operand::INT8) {
            KERNEL.run(rows, row_bytes, panel, p.n_padded() / KERNEL.kp, tile);
            for (int r = 0; r < KERNEL.mr; r++) {
                for (int j = 0; j < KERNEL.nr; j += LANES) {
                    finish(r, j, load(tile + r * KERNEL.nr + j));
                }
            }
            return;
        }
        alignas(64) int32_t products[BLOCKS_AT_ONCE * SIZE];
        const auto *        scale = reinterpret_cast<const float *>(panel + p.panel_values_bytes());
        const float *       sum   = scale + p.n_blocks * KERNEL.nr;
        for (int64_t first = 0; first < p.n_blocks; first += BLOCKS_AT_ONCE) {
            const int64_t last = first + BLOCKS_AT_ONCE < p.n_blocks ? first + BLOCKS_AT_ONCE : p.n_blocks;
            for (int64_t b = first; b < last; b++) {
                KERNEL.run(rows + b * p.block, row_bytes, panel + b * p.block * KERNEL.nr, p.block / KERNEL.kp,
                           products + (b - first) * SIZE);
            }
            for (int r = 0; r < KERNEL.mr; r++) {
                const auto * row_scale =
                    reinterpret_cast<const float *>(rows + static_cast<size_t>(r) * row_bytes + p.row_values_bytes());
                const float * offset = row_scale + p.n_blocks;
                for (int j = 0; j < KERNEL.nr; j += LANES) {
                    Floats value = first == 0 ? Floats{} : load(tile + r * KERNEL.nr + j);
                    for (int64_t b = first; b < last; b++) {
                        const int32_t * at = products + (b - first) * SIZE + r * KERNEL.nr + j;
                        value += __builtin_convertvector(load(at), Floats) *
                                 (load(scale + b * KERNEL.nr + j) * row_scale[b]);
                        value += load(sum + b * KERNEL.nr + j) * offset[b];
                    }
                    if (last < p.n_blocks) {
                        store(tile + r * KERNEL.nr + j, value);
                    } else {
                        finish(r, j, value);
                    }
                }
            }
        }
    }

    static void linear(const LinearTask & task, int64_t panel, int64_t row_begin, int64_t row_end) {
        switch (task.packing.operand) {
        case Operand::INT8:
            return linear_of<Operand::INT8>(task, panel, row_begin, row_end);
        case Operand::BF16:
            return linear_of<Operand::BF16>(task, panel, row_begin, row_end);
        case Operand::F32:
            return linear_of<Operand::F32>(task, panel, row_begin, row_end);
        }
    }

    template <Operand OPERAND>
    static void linear_of(const LinearTask & task, int64_t panel, int64_t row_begin, int64_t row_end) {
        switch (task.epilogue) {
        case Epilogue::NONE:
            return linear_with<OPERAND>(task, panel, row_begin, row_end, [](Floats v, int64_t, int64_t) { return v; });
        case Epilogue::GELU_TANH:
            return linear_with<OPERAND>(task, panel, row_begin, row_end, [](Floats v, int64_t, int64_t) {
                return OPERAND == Operand::INT8 ? gelu_tanh_rough(v) : gelu_tanh(v);
            });
        case Epilogue::GELU_ERF:
            return linear_with<OPERAND>(task, panel, row_begin, row_end,
                                        [](Floats v, int64_t, int64_t) { return gelu_erf(v); });
        case Epilogue::RESIDUAL:
            return linear_with<OPERAND>(task, panel, row_begin, row_end, [&task](Floats v, int64_t at, int64_t n) {
                const float * residual = task.residual + at;
                return v + (n == LANES ? load(residual) : load_part(residual, n));
            });
        }
    }

    template <Operand OPERAND, class Finish>
    OMNIVLM_INLINE void linear_with(const LinearTask & task, int64_t panel, int64_t row_begin, int64_t row_end,
                                    Finish finish) {
        const Packing &   p        = task.packing;
        constexpr int     NR       = micro(OPERAND).nr;
        const char *      data     = task.panels + static_cast<size_t>(panel) * p.panel_bytes();
        const int64_t     column   = panel * NR;
        const int64_t     n        = task.n_out - column < NR ? task.n_out - column : NR;
        alignas(64) float bias[NR] = {};
        __builtin_memcpy(bias, task.bias + column, static_cast<size_t>(n) * sizeof(float));
        for (int64_t row = row_begin; row < row_end; row += p.mr) {
            const int64_t n_rows = row_end - row;
            product<OPERAND>(p, task.rows + static_cast<size_t>(row) * p.row_bytes(), data,
                             [&](int r, int j, Floats v) {
                                 const int64_t left = n - j < LANES ? n - j : LANES;
                                 if (r < n_rows && left > 0) {
                                     const int64_t at = (row + r) * task.n_out + column + j;
                                     store_part(task.out + at, finish(v + load(bias + j), at, left), left);
                                 }
                             });
        }
    }

    // ---- attention -----------------------------------------------------------------------------
    //
    // Transposed, so that the softmax runs along the lanes of nr queries at once:
    //   scores  [n_tokens][nr] = keys (rows)      times  a panel of nr queries
    //   out^T   [d_head][nr]   = values^T (rows)  times  a panel of nr softmax columns

    struct AttentionMemory {
        Packing qk;       // over d_head
        Packing pv;       // over n_tokens
        char *  keys;     // rows [n_tokens, padded to mr]
        char *  values;   // rows [d_head, padded to mr], transposed
        char *  queries;  // a panel of qk
        char *  weights;  // a panel of pv
        float * sums;     // INT8: of a transposed row's quantised values, [d_head]
        float * poison;   // INT8: 0, or NaN if a key is no number
        float * scores;   // [n_tokens, padded to mr][nr]
        float * row;      // some rows of floats
        char *  scratch;  // of write_panel
        float * mean;     // of the keys, [d_head]
        size_t  bytes;
    };

    static Packing packing_of(Operand operand, int64_t n_in) {
        const MicroKernel kernel = micro(operand);
        return { operand, kernel.mr, kernel.nr, kernel.kp, n_in, round_up(n_in, kernel.kp), 1 };
    }

    static AttentionMemory attention_memory(const AttentionTask & task, char * base) {
        AttentionMemory m{};
        m.qk             = packing_of(task.operand, task.d_head);
        m.pv             = packing_of(task.operand, task.n_tokens);
        size_t     used  = 0;
        const auto place = [&](int64_t bytes) {
            char * at = base == nullptr ? nullptr : base + used;
            used += static_cast<size_t>(round_up(bytes, 64));
            return at;
        };
        const int64_t n_keys   = round_up(task.n_tokens, m.qk.mr);
        const int64_t n_values = round_up(task.d_head, m.pv.mr);
        m.keys                 = place(n_keys * static_cast<int64_t>(m.qk.row_bytes()));
        m.values               = place(n_values * static_cast<int64_t>(m.pv.row_bytes()));
        m.queries              = place(static_cast<int64_t>(m.qk.panel_bytes()));
        m.weights              = place(static_cast<int64_t>(m.pv.panel_bytes()));
        m.sums                 = reinterpret_cast<float *>(place(n_values * 4));
        m.poison               = reinterpret_cast<float *>(place(4));
        m.scores  = reinterpret_cast<float *>(place((n_keys > task.d_head ? n_keys : task.d_head) * m.qk.nr * 4));
        m.row     = reinterpret_cast<float *>(place((m.pv.n_padded() + m.qk.n_padded()) * 4 * LANES));
        m.scratch = place(static_cast<int64_t>(m.qk.panel_scratch_bytes()));
        m.mean    = reinterpret_cast<float *>(place(round_up(task.d_head, LANES) * 4));
        m.bytes   = used;
        return m;
    }

    static size_t attention_scratch_bytes(const AttentionTask & task) { return attention_memory(task, nullptr).bytes; }

    static void attention(const AttentionTask & task, int64_t query_begin, int64_t query_end, char * scratch) {
        const AttentionMemory m = attention_memory(task, scratch);
        write_keys(task, m);
        write_values(task, m);
        for (int64_t first = query_begin; first < query_end; first += m.qk.nr) {
            const int64_t left = query_end - first;
            const int     n    = static_cast<int>(left < m.qk.nr ? left : m.qk.nr);
            switch (task.operand) {
            case Operand::INT8:
                attend<Operand::INT8>(task, m, first, n);
                break;
            case Operand::BF16:
                attend<Operand::BF16>(task, m, first, n);
                break;
            case Operand::F32:
                attend<Operand::F32>(task, m, first, n);
                break;
            }
        }
    }

    // Minus their mean: it adds the same to all scores of a query, which softmax does not see, and what is left
    // is smaller and loses less when it is quantised.
    static void write_keys(const AttentionTask & task, const AttentionMemory & m) {
        float poison = 0.0F;
        __builtin_memset(m.mean, 0, static_cast<size_t>(task.d_head) * 4);
        if (task.operand == Operand::INT8) {
            for (int64_t t = 0; t < task.n_tokens; t++) {
                for (int64_t d = 0; d < task.d_head; d++) {
                    m.mean[d] += task.k[t * task.stride + d];
                }
            }
            for (int64_t d = 0; d < task.d_head; d++) {
                m.mean[d] /= static_cast<float>(task.n_tokens);
            }
        }
        for (int64_t t = 0; t < task.n_tokens; t++) {
            for (int64_t d = 0; d < task.d_head; d++) {
                m.row[d] = task.k[t * task.stride + d] - m.mean[d];
            }
            char * row = m.keys + static_cast<size_t>(t) * m.qk.row_bytes();
            write_row(m.qk, m.row, nullptr, nullptr, row);
            if (task.operand == Operand::INT8) {
                poison += *reinterpret_cast<const float *>(row + m.qk.row_values_bytes()) * 0.0F;
            }
        }
        m.poison[0] = poison;
    }

    static void write_values(const AttentionTask & task, const AttentionMemory & m) {
        const int64_t n = task.n_tokens;
        for (int64_t first = 0; first < task.d_head; first += LANES) {
            const int64_t count = task.d_head - first < LANES ? task.d_head - first : LANES;
            for (int64_t t = 0; t < n; t += LANES) {  // a square at a time stays in the first cache
                const int64_t n_rows = n - t < LANES ? n - t : LANES;
                for (int64_t d = 0; d < count; d++) {
                    for (int64_t i = 0; i < n_rows; i++) {
                        m.row[d * n + t + i] = task.v[(t + i) * task.stride + first + d];
                    }
                }
            }
            for (int64_t d = 0; d < count; d++) {
                char * row = m.values + static_cast<size_t>(first + d) * m.pv.row_bytes();
                write_row(m.pv, m.row + d * n, nullptr, nullptr, row);
                if (task.operand == Operand::INT8) {
                    m.sums[first + d] = sum_of_row(row, n);
                }
            }
        }
    }

    static float sum_of_row(const char * row, int64_t n) {
        int32_t sum = 0;
        for (int64_t i = 0; i < n; i++) {
            sum += Isa::INT8_ROW_BIAS != 0 ? static_cast<int32_t>(static_cast<signed char>(row[i]))
                                           : static_cast<int32_t>(static_cast<unsigned char>(row[i]));
        }
        return static_cast<float>(sum);
    }

    template <Operand OPERAND>
    static void attend(const AttentionTask & task, const AttentionMemory & m, int64_t first, int n_valid) {
        constexpr MicroKernel KERNEL = micro(OPERAND);
        constexpr int         NR     = KERNEL.nr;
        write_panel(m.qk, task.q + first * task.stride, task.stride, n_valid, m.scratch, m.queries);

        Floats most[NR / LANES];
        for (Floats & lanes : most) {
            lanes = splat(-__builtin_inff());
        }
        for (int64_t t = 0; t < task.n_tokens; t += KERNEL.mr) {
            const int64_t n_rows = task.n_tokens - t;
            product<OPERAND>(m.qk, m.keys + static_cast<size_t>(t) * m.qk.row_bytes(), m.queries,
                             [&](int r, int j, Floats score) {
                                 store(m.scores + (t + r) * NR + j, score);
                                 Floats & lanes = most[j / LANES];
                                 lanes          = r < n_rows && score > lanes ? score : lanes;
                             });
        }

        alignas(64) float totals[NR];
        for (int j = 0; j < NR; j += LANES) {
            store(totals + j, softmax<OPERAND>(task, m, j, most[j / LANES]));
        }

        float *             out = m.scores;  // [d_head][NR]; the scores are needed no more
        alignas(64) int32_t products[KERNEL.mr * NR];
        for (int64_t d = 0; d < task.d_head; d += KERNEL.mr) {
            KERNEL.run(m.values + static_cast<size_t>(d) * m.pv.row_bytes(), m.pv.row_bytes(), m.weights,
                       m.pv.n_padded() / KERNEL.kp, products);
            const int64_t n_rows = task.d_head - d < KERNEL.mr ? task.d_head - d : KERNEL.mr;
            for (int64_t r = 0; r < n_rows; r++) {
                for (int j = 0; j < NR; j += LANES) {
                    store(out + (d + r) * NR + j,
                          weighted_mean<OPERAND>(m, products + r * NR + j, d + r, load(totals + j)));
                }
            }
        }
        for (int i = 0; i < n_valid; i++) {
            float * row = task.out + (first + i) * task.stride;
            for (int64_t d = 0; d < task.d_head; d++) {
                row[d] = out[d * NR + i];
            }
        }
    }

    // Softmax weights of some queries into the panel, unnormalised: at most 1, or 255 in INT8. Returns their sums.
    template <Operand OPERAND>
    static Floats softmax(const AttentionTask & task, const AttentionMemory & m, int lane, Floats most) {
        if (OPERAND == Operand::INT8) {
            return int8_weights(task, m, lane, most);
        }
        if (OPERAND == Operand::BF16) {
            return float_weights<2>(task, m, lane, most, [](Floats & e) {
                e = bits<Floats>(to_bf16(e));
                return bits<Words>(e) >> 16;
            });
        }
        return float_weights<1>(task, m, lane, most, [](Floats & e) { return bits<Words>(e); });
    }

    static Floats int8_weights(const AttentionTask & task, const AttentionMemory & m, int lane, Floats most) {
        constexpr float LOG2_255 = 7.9943534F;
        const float     to_log2  = task.scale * LOG2_E;
        const int64_t   n_words  = m.pv.kp / 4;
        Words           total    = {};
        const auto      weight   = [&](int64_t key) {
            const Floats e = exp2_rough((load(m.scores + key * m.qk.nr + lane) - most) * to_log2 + LOG2_255);
            const Words  q = whole(e + 0.5F);
            total += q;
            return q;
        };
        for (int64_t t = 0; t < m.pv.n_padded(); t += 4) {
            Words word = {};
            if (t + 4 <= task.n_tokens) {
                word = weight(t) | weight(t + 1) << 8 | weight(t + 2) << 16 | weight(t + 3) << 24;
            } else {
                for (int64_t i = 0; t + i < task.n_tokens; i++) {
                    word |= weight(t + i) << static_cast<uint32_t>(8 * i);
                }
            }
            store_word(m, lane, t / 4, n_words, word ^ 0x80808080U);  // minus 128: the operand is signed
        }
        // Scores that are no numbers have left no trace in whole ones.
        const auto * scale = reinterpret_cast<const float *>(m.queries + m.qk.panel_values_bytes());
        return __builtin_convertvector(bits<Ints>(total), Floats) + (load(scale + lane) * 0.0F + m.poison[0]);
    }

    template <int PER_WORD, class Convert>
    static Floats float_weights(const AttentionTask & task, const AttentionMemory & m, int lane, Floats most,
                                Convert convert) {
        const float to_log2 = task.scale * LOG2_E;
        Floats      total   = {};
        for (int64_t t = 0; t < m.pv.n_padded(); t += PER_WORD) {
            Words word = {};
            for (int i = 0; i < PER_WORD && t + i < task.n_tokens; i++) {
                Floats e = exp2((load(m.scores + (t + i) * m.qk.nr + lane) - most) * to_log2);
                word |= convert(e) << static_cast<uint32_t>(16 * i);
                total += e;
            }
            store_word(m, lane, t / PER_WORD, 1, word);
        }
        return total;
    }

    // The panel's word `index` of each lane's column.
    OMNIVLM_INLINE void store_word(const AttentionMemory & m, int lane, int64_t index, int64_t words_per_step,
                                   Words word) {
        const int64_t step = index / words_per_step;
        auto *        out =
            reinterpret_cast<uint32_t *>(m.weights) + (step * m.qk.nr + lane) * words_per_step + index % words_per_step;
        if (words_per_step == 1) {
            store(out, word);
        } else {
            for (int i = 0; i < LANES; i++) {
                out[i * words_per_step] = word[i];
            }
        }
    }

    template <Operand OPERAND>
    OMNIVLM_INLINE Floats weighted_mean(const AttentionMemory & m, const int32_t * products, int64_t d, Floats total) {
        if (OPERAND != Operand::INT8) {
            return bits<Floats>(load(products)) / total;
        }
        // The weights in the panel are 128 less than they stand for.
        const auto * scale    = reinterpret_cast<const float *>(m.values + static_cast<size_t>(d) * m.pv.row_bytes() +
                                                                m.pv.row_values_bytes());
        const Floats weighted = __builtin_convertvector(load(products), Floats) + 128.0F * m.sums[d];
        return weighted / total * scale[0] + scale[1];
    }

    static constexpr Kernels table(const char * name, bool (*supported)(), BlockwiseKernels blockwise = {},
                                   CachedAttentionKernels cached_attention = {}) {
        return { name,
                 supported,
                 { Isa::int8(), Isa::bf16(), Isa::f32() },
                 write_row,
                 write_panel,
                 linear,
                 attention,
                 attention_scratch_bytes,
                 blockwise,
                 cached_attention };
    }
};

}  // namespace
}  // namespace omnivlm
