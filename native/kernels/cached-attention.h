// Attention of a text model to its key-value cache, once for all instruction sets whose Dot has
// `load_halves` (blockwise.h). Sums are FP32; a query's result depends on its own cells alone.

#pragma once

#include "loops.h"
#include "tile.h"

namespace omnivlm {
namespace {

template <class Dot> struct CachedAttention {
    static constexpr uint16_t UNSEEN    = 0xfc00;  // minus infinity
    static constexpr int64_t  MAX_GROUP = 64;      // query heads for one head of keys

    // What one query and one head of keys need, of a thread's scratch. Query heads are padded with zeros.
    struct Memory {
        int32_t * cells;   // that the query sees
        float *   q;       // [heads][d], scaled
        float *   scores;  // [heads][stride]
        int64_t   stride;
    };

    static constexpr int64_t MAX_HEADS = 4;  // whose values are weighed at a time

    // As many as have room for their sums in the registers: 32, of vectors of 8 lanes 16.
    static constexpr int heads_at_once(int d) {
        const int n = (LANES == 8 ? 8 : 16) / (d / LANES);
        return n < 1 ? 1 : n;
    }

    OMNIVLM_ALWAYS_INLINE static int64_t padded_heads(const CachedAttentionTask & task) {
        return round_up(task.n_heads / task.n_heads_kv, MAX_HEADS);
    }

    OMNIVLM_ALWAYS_INLINE static Memory divide(const CachedAttentionTask & task, char * scratch) {
        Memory m{};
        m.stride = round_up(task.n_cells, 16);
        m.cells  = reinterpret_cast<int32_t *>(scratch);
        m.q      = reinterpret_cast<float *>(scratch) + m.stride;
        m.scores = m.q + padded_heads(task) * task.d;
        return m;
    }

    static size_t scratch_bytes(const CachedAttentionTask & task) {
        const int64_t stride = round_up(task.n_cells, 16);
        return static_cast<size_t>(stride + padded_heads(task) * (task.d + stride)) * sizeof(float);
    }

    // LANES values. Dot's vectors may be narrower.
    OMNIVLM_ALWAYS_INLINE static Floats halves(const char * p) {
        constexpr int        N = static_cast<int>(sizeof(Floats)) / Dot::BYTES;
        typename Dot::Vector parts[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            parts[i] = Dot::load_halves(p + i * Dot::BYTES / 2);
        }
        Floats v;
        __builtin_memcpy(&v, parts, sizeof(v));
        return v;
    }

    // A sum in few steps: most of the scores' cost.
    OMNIVLM_ALWAYS_INLINE static float total(Floats v) {
        using Four = float __attribute__((vector_size(16)));
        Four parts[LANES / 4];
        __builtin_memcpy(parts, &v, sizeof(v));
#pragma GCC unroll 2
        for (int n = LANES / 8; n > 0; n /= 2) {
#pragma GCC unroll 2
            for (int i = 0; i < n; i++) {
                parts[i] += parts[i + n];
            }
        }
        return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
    }

    // The scores of some heads for one cell after the other.
    template <int D>
    OMNIVLM_LEAF static void score(const CachedAttentionTask & task, const char * keys, int64_t n, const Memory & m) {
        constexpr int J       = D / LANES;
        const int64_t n_heads = task.n_heads / task.n_heads_kv;
        for (int64_t i = 0; i < n; i++) {
            const char * key = keys + static_cast<size_t>(m.cells[i]) * task.k_cell;
            Floats       k[J];
#pragma GCC unroll 32
            for (int j = 0; j < J; j++) {
                k[j] = halves(key + j * LANES * 2);
            }
            for (int64_t h = 0; h < n_heads; h++) {
                Floats sums = load(m.q + h * D) * k[0];
#pragma GCC unroll 32
                for (int j = 1; j < J; j++) {
                    sums = sums + load(m.q + h * D + j * LANES) * k[j];
                }
                m.scores[h * m.stride + i] = total(sums);
            }
        }
    }

    // Scores -> weights that add up to the sum returned.
    static float soften(float * scores, int64_t n) {
        const int64_t whole = round_up(n, LANES);
        for (int64_t i = n; i < whole; i++) {
            scores[i] = -__builtin_inff();
        }
        Floats most = load(scores);
        for (int64_t i = LANES; i < whole; i += LANES) {
            const Floats other = load(scores + i);
            most               = other > most ? other : most;
        }
        const float largest = largest_of(most);
        Floats      sums    = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats weights = exp2(load(scores + i) - largest);
            store(scores + i, weights);
            sums += weights;
        }
        return sum_of(sums);
    }

    // The weighted values of `HEADS` heads, from `first` on; `factors` make the weights add up to 1.
    template <int D, int HEADS>
    OMNIVLM_LEAF static void weigh(const CachedAttentionTask & task, const char * values, int64_t n, const Memory & m,
                                   int64_t first, const float * factors, float * out) {
        constexpr int J = D / LANES;
        Floats        sums[HEADS][J];
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
#pragma GCC unroll 32
            for (int j = 0; j < J; j++) {
                sums[h][j] = Floats{};
            }
        }
        const float * weights = m.scores + first * m.stride;
        for (int64_t i = 0; i < n; i++) {
            const char * value = values + static_cast<size_t>(m.cells[i]) * task.v_cell;
#pragma GCC unroll 32
            for (int j = 0; j < J; j++) {
                const Floats v = halves(value + j * LANES * 2);
#pragma GCC unroll 8
                for (int h = 0; h < HEADS; h++) {
                    sums[h][j] = sums[h][j] + splat(weights[h * m.stride + i]) * v;
                }
            }
        }
        const int64_t left = task.n_heads / task.n_heads_kv - first;
#pragma GCC unroll 8
        for (int h = 0; h < HEADS; h++) {
            if (h < left) {
#pragma GCC unroll 32
                for (int j = 0; j < J; j++) {
                    store(out + h * D + j * LANES, sums[h][j] * factors[first + h]);
                }
            }
        }
    }

    template <int D>
    static void attend(const CachedAttentionTask & task, int64_t query, int64_t head_kv, const Memory & m) {
        constexpr int HEADS = heads_at_once(D);
        static_assert(MAX_HEADS % HEADS == 0);
        const int64_t n_heads = task.n_heads / task.n_heads_kv;
        const auto *  mask = reinterpret_cast<const uint16_t *>(task.mask + static_cast<size_t>(query) * task.mask_row);
        int64_t       n    = 0;
        for (int64_t c = 0; c < task.n_cells; c++) {
            m.cells[n] = static_cast<int32_t>(c);
            n += mask[c] != UNSEEN ? 1 : 0;
        }
        const char * q =
            task.q + static_cast<size_t>(query) * task.q_row + static_cast<size_t>(head_kv * n_heads) * task.q_head;
        for (int64_t h = 0; h < n_heads; h++) {
            const auto * row = reinterpret_cast<const float *>(q + static_cast<size_t>(h) * task.q_head);
            for (int i = 0; i < D; i += LANES) {
                store(m.q + h * D + i, load(row + i) * (task.scale * LOG2_E));
            }
        }
        score<D>(task, task.k + static_cast<size_t>(head_kv) * task.k_head, n, m);
        float factors[MAX_GROUP + MAX_HEADS] = {};
        for (int64_t h = 0; h < n_heads; h++) {
            factors[h] = n > 0 ? 1.0F / soften(m.scores + h * m.stride, n) : 0.0F;
        }
        for (int64_t h = n_heads; h < padded_heads(task); h++) {
            __builtin_memset(m.scores + h * m.stride, 0, static_cast<size_t>(n) * sizeof(float));
        }
        float * out = task.out + (query * task.n_heads + head_kv * n_heads) * D;
        for (int64_t h = 0; h < n_heads; h += HEADS) {
            weigh<D, HEADS>(task, task.v + static_cast<size_t>(head_kv) * task.v_head, n, m, h, factors, out + h * D);
        }
    }

    static bool takes(const CachedAttentionTask & task) {
        return (task.d == 64 || task.d == 128) && task.n_heads % task.n_heads_kv == 0 &&
               task.n_heads / task.n_heads_kv <= MAX_GROUP;
    }

    static void run(const CachedAttentionTask & task, int64_t query, int64_t head_kv, char * scratch) {
        const Memory m = divide(task, scratch);
        if (task.d == 64) {
            attend<64>(task, query, head_kv, m);
        } else {
            attend<128>(task, query, head_kv, m);
        }
    }

    static constexpr CachedAttentionKernels table() { return { takes, scratch_bytes, run }; }
};

}  // namespace
}  // namespace omnivlm
