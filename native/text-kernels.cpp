#include "text-kernels.h"

#include "ggml-backend.h"
#include "ggml-cpu-abi.h"
#include "ggml-cpu.h"
#include "kernels/kernel.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace omnivlm {
namespace {

// How llama.cpp's formats stand for values: ggml/src/ggml-common.h.
// Q8_0: 32 values; FP16 scale, then a signed byte each.
constexpr int64_t Q8_0_BYTES = 34;
// IQ4_NL and Q4_0: 32 values; FP16 scale, then 16 bytes: value i in the lower half of byte i, 16 + i in the upper one.
constexpr int64_t SMALL_BLOCK_BYTES = 18;
// Q4_K: 256 values; FP16 scales of the 6-bit scales and minima, these in 12 bytes, then 128 bytes: of each 32 bytes
// the lower halves are 32 values, the upper halves the next 32.
constexpr int64_t SUPER_BLOCK        = 256;
constexpr int64_t SUPER_BLOCK_BYTES  = 144;
constexpr int64_t SUPER_BLOCK_SCALES = 4;
constexpr int64_t SUPER_BLOCK_VALUES = 16;

constexpr int64_t MAX_PACKERS = 8;  // threads: more wait for memory only

struct Format {
    std::array<int, 16> values;  // that the 16 codes of 4 bits stand for, scaled
    Blocks              blocks;
    int                 zero;  // what values are raised by where they must not be negative
};

constexpr std::array<int, 16> FROM_ZERO  = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
constexpr std::array<int, 16> FROM_MINUS = { -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 };
constexpr std::array<int, 16> UNEVEN     = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };

constexpr Format Q4_0   = { FROM_MINUS, Blocks::FOUR, 8 };
constexpr Format IQ4_NL = { UNEVEN, Blocks::FOUR, 127 };
constexpr Format Q4_K   = { FROM_ZERO, Blocks::FOUR_WITH_MINIMUM, 0 };
constexpr Format Q8_0   = { FROM_ZERO, Blocks::EIGHT, 128 };

const Format * format_of(ggml_type type) {
    switch (type) {
    case GGML_TYPE_Q4_0:
        return &Q4_0;
    case GGML_TYPE_IQ4_NL:
        return &IQ4_NL;
    case GGML_TYPE_Q4_K:
        return &Q4_K;
    case GGML_TYPE_Q8_0:
        return &Q8_0;
    default:
        return nullptr;
    }
}

const BlockwiseKernels & kernels() {
    return best_kernels().blockwise;
}

bool is_packable(const ggml_tensor * weights) {
    return format_of(weights->type) != nullptr && ggml_n_dims(weights) == 2 && weights->ne[0] % BLOCKWISE_BLOCK == 0 &&
           weights->ne[1] % BLOCKWISE_COLUMNS == 0;
}

size_t packed_bytes(const ggml_tensor * weights) {
    const int64_t blocks = weights->ne[0] / BLOCKWISE_BLOCK * (weights->ne[1] / BLOCKWISE_COLUMNS);
    return static_cast<size_t>(blocks * blockwise_block_bytes(format_of(weights->type)->blocks));
}

// --- packing ----------------------------------------------------------------------------------------

uint16_t load_half(const uint8_t * p) {
    uint16_t half = 0;
    std::memcpy(&half, p, 2);
    return half;
}

// The bytes of column `j` of a panel's block.
void put(uint8_t * block, int64_t j, const uint8_t * bytes, int64_t n_bytes = 16) {
    for (int64_t s = 0; s < n_bytes / 4; s++) {
        std::memcpy(block + (s * BLOCKWISE_COLUMNS + j) * 4, bytes + 4 * s, 4);
    }
}

void put_half(Blocks blocks, uint8_t * block, int64_t index, uint16_t half) {
    std::memcpy(block + blockwise_value_bytes(blocks) + 2 * index, &half, 2);
}

void pack_small_blocks(const uint8_t * row, int64_t n_blocks, int64_t j, uint8_t * panel) {
    for (int64_t b = 0; b < n_blocks; b++, row += SMALL_BLOCK_BYTES, panel += blockwise_block_bytes(Blocks::FOUR)) {
        put_half(Blocks::FOUR, panel, j, load_half(row));
        put(panel, j, row + 2);
    }
}

void pack_bytes(const uint8_t * row, int64_t n_blocks, int64_t j, uint8_t * panel) {
    const uint8_t raised = kernels().is_signed ? 0 : 128;
    for (int64_t b = 0; b < n_blocks; b++, row += Q8_0_BYTES, panel += blockwise_block_bytes(Blocks::EIGHT)) {
        put_half(Blocks::EIGHT, panel, j, load_half(row));
        std::array<uint8_t, BLOCKWISE_BLOCK> bytes{};
        for (size_t i = 0; i < bytes.size(); i++) {
            bytes[i] = row[2 + i] ^ raised;
        }
        put(panel, j, bytes.data(), BLOCKWISE_BLOCK);
    }
}

void pack_super_blocks(const uint8_t * row, int64_t n_blocks, int64_t j, uint8_t * panel) {
    for (int64_t first = 0; first < n_blocks; first += SUPER_BLOCK / BLOCKWISE_BLOCK, row += SUPER_BLOCK_BYTES) {
        const float     scale   = ggml_fp16_to_fp32(load_half(row));
        const float     minimum = ggml_fp16_to_fp32(load_half(row + 2));
        const uint8_t * q       = row + SUPER_BLOCK_SCALES;
        for (int64_t b = 0; b < SUPER_BLOCK / BLOCKWISE_BLOCK; b++, panel += blockwise_block_bytes(Q4_K.blocks)) {
            const int64_t i           = b % 4;
            const int     six_scale   = b < 4 ? q[i] & 63 : (q[i + 8] & 15) | (q[i] >> 6 << 4);
            const int     six_minimum = b < 4 ? q[i + 4] & 63 : (q[i + 8] >> 4) | (q[i + 4] >> 6 << 4);
            put_half(Q4_K.blocks, panel, j, ggml_fp32_to_fp16(scale * static_cast<float>(six_scale)));
            put_half(Q4_K.blocks, panel, BLOCKWISE_COLUMNS + j,
                     ggml_fp32_to_fp16(minimum * static_cast<float>(six_minimum)));
            const uint8_t *         values = row + SUPER_BLOCK_VALUES + b / 2 * 32;
            std::array<uint8_t, 16> bytes{};
            for (size_t v = 0; v < bytes.size(); v++) {
                const int low  = b % 2 == 0 ? values[v] & 15 : values[v] >> 4;
                const int high = b % 2 == 0 ? values[v + 16] & 15 : values[v + 16] >> 4;
                bytes[v]       = static_cast<uint8_t>(low | high << 4);
            }
            put(panel, j, bytes.data());
        }
    }
}

void pack_panels(const ggml_tensor * weights, const char * data, int64_t begin, int64_t end) {
    const Blocks  blocks    = format_of(weights->type)->blocks;
    const int64_t n_blocks  = weights->ne[0] / BLOCKWISE_BLOCK;
    const auto    row_bytes = static_cast<int64_t>(ggml_row_size(weights->type, weights->ne[0]));
    for (int64_t panel = begin; panel < end; panel++) {
        auto * at = static_cast<uint8_t *>(weights->data) + panel * n_blocks * blockwise_block_bytes(blocks);
        for (int64_t j = 0; j < BLOCKWISE_COLUMNS; j++) {
            const char * row = data + (panel * BLOCKWISE_COLUMNS + j) * row_bytes;
            (blocks == Blocks::EIGHT  ? pack_bytes
             : blocks == Blocks::FOUR ? pack_small_blocks
                                      : pack_super_blocks)(reinterpret_cast<const uint8_t *>(row), n_blocks, j, at);
        }
    }
}

// --- ggml's interface: matrices that lie in our buffers ---------------------------------------------

class Product : public ggml::cpu::tensor_traits {
  public:
    // The rows, and 64 bytes to align them.
    bool work_size(int /*n_threads*/, const ggml_tensor * op, size_t & size) override {
        const int64_t n_blocks = op->src[0]->ne[0] / BLOCKWISE_BLOCK;
        size                   = static_cast<size_t>(n_blocks * blockwise_rows_bytes(op->src[1]->ne[1]) + 64);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const ggml_tensor * weights = op->src[0];  // [n_in, n_out]
        const ggml_tensor * x       = op->src[1];  // [n_in, n_rows]
        const Format &      format  = *format_of(weights->type);

        const int               zero = kernels().is_signed ? 0 : format.zero;
        std::array<uint8_t, 16> codebook{};
        for (size_t i = 0; i < codebook.size(); i++) {
            codebook[i] = static_cast<uint8_t>(format.values[i] + zero);
        }
        const auto          address = (reinterpret_cast<uintptr_t>(params->wdata) + 63) / 64 * 64;
        const BlockwiseTask task{ static_cast<const char *>(weights->data),
                                  reinterpret_cast<char *>(address),
                                  static_cast<float *>(op->data),
                                  x->ne[1],
                                  weights->ne[1],
                                  weights->ne[0] / BLOCKWISE_BLOCK,
                                  codebook.data(),
                                  zero,
                                  format.blocks };
        for (int64_t r = params->ith; r < task.n_rows; r += params->nth) {
            const char * row = static_cast<const char *>(x->data) + static_cast<size_t>(r) * x->nb[1];
            kernels().write_row(task, reinterpret_cast<const float *>(row), r);
        }
        ggml_barrier(params->threadpool);
        const int64_t n_panels = task.n_out / BLOCKWISE_COLUMNS;
        kernels().linear(task, n_panels * params->ith / params->nth, n_panels * (params->ith + 1) / params->nth);
        return true;
    }
};

float op_parameter(const ggml_tensor * op, size_t index) {
    float value = 0.0F;
    std::memcpy(&value, op->op_params + index, sizeof(value));
    return value;
}

// Attention to a key-value cache in FP16.
class Attention : public ggml::cpu::tensor_traits {
  public:
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        if (!takes(op, n_threads)) {
            return false;
        }
        size = scratch_bytes(op) * static_cast<size_t>(n_threads) + 64;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (!takes(op, params->nth)) {
            return false;
        }
        const size_t each = scratch_bytes(op);
        if (params->wsize < each * static_cast<size_t>(params->nth) + 64) {
            return false;
        }
        const CachedAttentionTask task    = task_of(op);
        const auto                address = (reinterpret_cast<uintptr_t>(params->wdata) + 63) / 64 * 64;
        char *                    scratch = reinterpret_cast<char *>(address) + each * static_cast<size_t>(params->ith);
        for (int64_t i = params->ith; i < op->src[0]->ne[1] * task.n_heads_kv; i += params->nth) {
            attention().run(task, i / task.n_heads_kv, i % task.n_heads_kv, scratch);
        }
        return true;
    }

  private:
    static const CachedAttentionKernels & attention() { return best_kernels().cached_attention; }

    // q [d, n_queries, n_heads], k and v [d, n_cells, n_heads_kv], mask [n_cells, n_queries] -> [d, n_heads, n_queries]
    static CachedAttentionTask task_of(const ggml_tensor * op) {
        const ggml_tensor * q    = op->src[0];
        const ggml_tensor * k    = op->src[1];
        const ggml_tensor * v    = op->src[2];
        const ggml_tensor * mask = op->src[3];
        return { static_cast<const char *>(q->data),
                 q->nb[1],
                 q->nb[2],
                 static_cast<const char *>(k->data),
                 k->nb[1],
                 k->nb[2],
                 static_cast<const char *>(v->data),
                 v->nb[1],
                 v->nb[2],
                 static_cast<const char *>(mask->data),
                 mask->nb[1],
                 static_cast<float *>(op->data),
                 q->ne[2],
                 k->ne[2],
                 k->ne[1],
                 q->ne[0],
                 op_parameter(op, 0) };
    }

    static bool takes(const ggml_tensor * op, int n_threads) {
        const ggml_tensor * q     = op->src[0];
        const ggml_tensor * k     = op->src[1];
        const ggml_tensor * v     = op->src[2];
        const ggml_tensor * mask  = op->src[3];
        const bool          plain = op->src[4] == nullptr && op_parameter(op, 1) == 0.0F && op_parameter(op, 2) == 0.0F;
        const auto          is_of = [](const ggml_tensor * tensor, ggml_type type) {  // rows without gaps
            return tensor->type == type && tensor->nb[0] == ggml_type_size(type);
        };
        if (attention().takes == nullptr || mask == nullptr || !plain || q->ne[3] != 1 || mask->ne[2] != 1 ||
            !is_of(q, GGML_TYPE_F32) || !is_of(k, GGML_TYPE_F16) || !is_of(v, GGML_TYPE_F16) || q->ne[0] != v->ne[0] ||
            k->ne[2] != v->ne[2]) {
            return false;
        }
        const int64_t n_parts = q->ne[1] * k->ne[2];
        return n_parts >= n_threads && attention().takes(task_of(op));
    }

    static size_t scratch_bytes(const ggml_tensor * op) {
        return (attention().scratch_bytes(task_of(op)) + 63) / 64 * 64;
    }
};

Product   product;
Attention attention;

class BufferType : public ggml::cpu::extra_buffer_type {
  public:
    bool supports_op(ggml_backend_dev_t /*device*/, const ggml_tensor * op) override {
        if (!is_ours(op) || !is_packable(op->src[0])) {
            return false;
        }
        const ggml_tensor * x = op->src[1];
        return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && x->ne[2] == 1 && x->ne[3] == 1 &&
               (x->buffer == nullptr || ggml_backend_buffer_is_host(x->buffer));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return &attention;
        }
        return is_ours(op) ? &product : nullptr;
    }

  private:
    static bool is_ours(const ggml_tensor * op);
};

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_OMNIVLM";
}

void set_tensor(ggml_backend_buffer_t /*buffer*/, ggml_tensor * weights, const void * data, size_t offset,
                size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(weights));
    const int64_t            n_panels  = weights->ne[1] / BLOCKWISE_COLUMNS;
    const int64_t            n_threads = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, MAX_PACKERS);
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(n_threads));
    int64_t begin = 0;
    try {
        for (int64_t i = 1; i < n_threads; i++) {
            const int64_t end = n_panels * i / n_threads;
            threads.emplace_back(pack_panels, weights, static_cast<const char *>(data), begin, end);
            begin = end;
        }
    } catch (const std::system_error &) {  // no more threads: this one does the rest
    }
    pack_panels(weights, static_cast<const char *>(data), begin, n_panels);
    for (std::thread & thread : threads) {
        thread.join();
    }
}

// The CPU's own buffer, but for how weights get into it.
ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer != nullptr) {
        buffer->buft       = type;
        buffer->set_tensor = set_tensor;
        buffer->get_tensor = nullptr;
        buffer->cpy_tensor = nullptr;
    }
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return is_packable(tensor) ? packed_bytes(tensor) : ggml_nbytes(tensor);
}

ggml_backend_buffer_type_t buffer_type() {
    static BufferType               behaviour;
    static ggml_backend_buffer_type type{ get_name,
                                          alloc_buffer,
                                          get_alignment,
                                          nullptr,
                                          get_alloc_size,
                                          nullptr,
                                          ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
                                          &behaviour };
    return &type;
}

bool BufferType::is_ours(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT && op->src[0]->buffer != nullptr &&
           ggml_backend_buffer_get_type(op->src[0]->buffer) == buffer_type();
}

}  // namespace

bool install_text_kernels() {
    if (kernels().linear == nullptr || std::string(ggml_version()) != GGML_ABI_VERSION) {
        return false;
    }
    auto & types = ggml_backend_cpu_get_extra_buffer_types();
    // ggml's AMX code, compiled by GCC 12, loads a tile configuration whose sizes were never stored (the compiler takes
    // LDTILECFG to read 8 of its 64 bytes), and the first prompt ends the process with an illegal instruction.
    types.erase(std::remove_if(
                    types.begin(), types.end(),
                    [](ggml_backend_buffer_type_t type) { return std::string(ggml_backend_buft_name(type)) == "AMX"; }),
                types.end());
    if (std::find(types.begin(), types.end(), buffer_type()) == types.end()) {
        types.insert(types.begin(), buffer_type());  // llama.cpp takes the first that supports a matrix
    }
    return true;
}

}  // namespace omnivlm
