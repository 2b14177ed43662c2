// Every kernel that this machine runs, against sums in double precision. Prints a line for each instruction set
// and exits with the number of failures. Needs nothing but the kernels, so that it also runs under an emulator:
//
//   kernel-test [NAME...]     only these instruction sets, each of which must be supported here
//   kernel-test --speed       throughput of each, as a share of what its instructions can do

#include "../kernels/kernel.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace omnivlm {
namespace {

int failures = 0;

void check(bool holds, const std::string & what) {
    if (!holds) {
        failures++;
        std::printf("FAILED %s\n", what.c_str());
    }
}

struct Free {
    void operator()(char * p) const { std::free(p); }
};

using Memory = std::unique_ptr<char[], Free>;

Memory allocate(size_t bytes) {
    return Memory(static_cast<char *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
}

using Matrix = std::vector<float>;  // row-major

// Normal values; one in 50 is 20 times as large, and every third row leans to one side.
Matrix random_matrix(int64_t n_rows, int64_t n, unsigned seed) {
    std::mt19937                    random(seed);
    std::normal_distribution<float> normal;
    Matrix                          matrix(static_cast<size_t>(n_rows * n));
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t i = 0; i < n; i++) {
            const float value                      = normal(random) * (random() % 50 == 0 ? 20.0F : 1.0F);
            matrix[static_cast<size_t>(r * n + i)] = r % 3 == 0 ? std::abs(value) + 1.0F : value;
        }
    }
    return matrix;
}

double relative_error(const std::vector<double> & want, const Matrix & got) {
    double difference = 0.0;
    double size       = 1e-30;
    for (size_t i = 0; i < want.size(); i++) {
        difference += (want[i] - got[i]) * (want[i] - got[i]);
        size += want[i] * want[i];
    }
    return std::sqrt(difference / size);  // NaN if any value is
}

// x [m, k] times w [n, k] transposed
std::vector<double> product(const std::vector<double> & x, const std::vector<double> & w, int64_t m, int64_t n,
                            int64_t k) {
    std::vector<double> y(static_cast<size_t>(m * n));
    for (int64_t r = 0; r < m; r++) {
        for (int64_t c = 0; c < n; c++) {
            double sum = 0.0;
            for (int64_t i = 0; i < k; i++) {
                sum += x[static_cast<size_t>(r * k + i)] * w[static_cast<size_t>(c * k + i)];
            }
            y[static_cast<size_t>(r * n + c)] = sum;
        }
    }
    return y;
}

float from_bf16(const char * p) {
    uint16_t half = 0;
    std::memcpy(&half, p, 2);
    const uint32_t word  = static_cast<uint32_t>(half) << 16;
    float          value = 0.0F;
    std::memcpy(&value, &word, 4);
    return value;
}

struct Operands {
    Packing             packing;
    Memory              rows, panels;
    std::vector<double> x, w;  // what the packed operands stand for
};

// Reads what kernel.h says of the two layouts.
Operands pack(const Kernels & kernels, const Packing & p, const Matrix & x, const Matrix & w, int64_t m, int64_t n,
              bool row_bias) {
    const int64_t n_rows   = (m + p.mr - 1) / p.mr * p.mr;
    const int64_t n_panels = (n + p.nr - 1) / p.nr;
    Operands      result{ p,
                     allocate(static_cast<size_t>(n_rows) * p.row_bytes()),
                     allocate(static_cast<size_t>(n_panels) * p.panel_bytes()),
                          {},
                          {} };
    std::memset(result.rows.get(), 0, static_cast<size_t>(n_rows) * p.row_bytes());
    const Memory scratch_memory = allocate(static_cast<size_t>(p.n_padded()) * 4);
    auto *       scratch        = reinterpret_cast<float *>(scratch_memory.get());
    for (int64_t r = 0; r < m; r++) {
        char * row = result.rows.get() + static_cast<size_t>(r) * p.row_bytes();
        kernels.write_row(p, x.data() + r * p.n_in, nullptr, scratch, row);
        const auto * scale = reinterpret_cast<const float *>(row + p.row_values_bytes());
        for (int64_t i = 0; i < p.n_in; i++) {
            double value = 0.0;
            if (p.operand == Operand::INT8) {
                const int64_t b = i / p.block;
                const int     q = row_bias ? static_cast<signed char>(row[i]) : static_cast<unsigned char>(row[i]);
                value           = static_cast<double>(scale[b]) * q + static_cast<double>(scale[p.n_blocks + b]);
            } else if (p.operand == Operand::BF16) {
                value = from_bf16(row + 2 * i);
            } else {
                value = reinterpret_cast<const float *>(row)[i];
            }
            result.x.push_back(value);
        }
    }
    const Memory panel_scratch = allocate(p.panel_scratch_bytes());
    for (int64_t panel = 0; panel < n_panels; panel++) {
        const int valid = static_cast<int>(std::min<int64_t>(p.nr, n - panel * p.nr));
        char *    out   = result.panels.get() + static_cast<size_t>(panel) * p.panel_bytes();
        kernels.write_panel(p, w.data() + panel * p.nr * p.n_in, p.n_in, valid, panel_scratch.get(), out);
        const auto * scale = reinterpret_cast<const float *>(out + p.panel_values_bytes());
        for (int64_t j = 0; j < valid; j++) {
            for (int64_t i = 0; i < p.n_in; i++) {
                const char * at = out + ((i / p.kp * p.nr + j) * p.kp + i % p.kp) * p.value_bytes();  // [steps][nr][kp]
                double       value = 0.0;
                if (p.operand == Operand::INT8) {
                    value = static_cast<double>(scale[i / p.block * p.nr + j]) * static_cast<signed char>(*at);
                } else if (p.operand == Operand::BF16) {
                    value = from_bf16(at);
                } else {
                    value = *reinterpret_cast<const float *>(at);
                }
                result.w.push_back(value);
            }
        }
    }
    return result;
}

Matrix run_linear(const Kernels & kernels, const Operands & operands, const Matrix & bias, const Matrix & residual,
                  int64_t m, int64_t n, Epilogue epilogue) {
    Matrix           out(static_cast<size_t>(m * n), -7.0F);
    const LinearTask task{
        operands.packing, operands.rows.get(), operands.panels.get(), bias.data(), residual.data(), out.data(), m, n,
        epilogue
    };
    const int64_t middle = m / 2 / operands.packing.mr * operands.packing.mr;
    for (int64_t panel = 0; panel * operands.packing.nr < n; panel++) {
        kernels.linear(task, panel, 0, middle);
        kernels.linear(task, panel, middle, m);
    }
    return out;
}

double epilogue_of(double v, double residual, Epilogue epilogue) {
    switch (epilogue) {
    case Epilogue::GELU_TANH:
        return 0.5 * v * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979) * (v + 0.044715 * v * v * v)));
    case Epilogue::GELU_ERF:
        return 0.5 * v * (1.0 + std::erf(v / std::sqrt(2.0)));
    case Epilogue::RESIDUAL:
        return v + residual;
    default:
        return v;
    }
}

const char * operand_name(Operand operand) {
    return operand == Operand::INT8 ? "int8" : operand == Operand::BF16 ? "bf16" : "f32";
}

bool signed_rows(const Kernels & kernels) {
    return std::strncmp(kernels.name, "neon", 4) == 0 || std::strcmp(kernels.name, "portable") == 0;
}

void test_linear(const Kernels & kernels, Operand operand, int64_t m, int64_t n, int64_t k, int64_t block) {
    const Packing     packing = kernels.packing(operand, k, block);
    const std::string label = std::string(kernels.name) + " " + operand_name(operand) + " linear " + std::to_string(m) +
                              "x" + std::to_string(n) + "x" + std::to_string(k) + " block " + std::to_string(block);
    const Matrix   x        = random_matrix(m, k, 1);
    const Matrix   w        = random_matrix(n, k, 2);
    Matrix         bias     = random_matrix(1, n, 3);
    const Matrix   residual = random_matrix(m, n, 4);
    const Operands operands = pack(kernels, packing, x, w, m, n, signed_rows(kernels));
    const auto     exact    = product({ x.begin(), x.end() }, { w.begin(), w.end() }, m, n, k);
    const auto     stood    = product(operands.x, operands.w, m, n, k);  // of the operands as they were rounded
    for (const Epilogue epilogue : { Epilogue::NONE, Epilogue::GELU_TANH, Epilogue::GELU_ERF, Epilogue::RESIDUAL }) {
        if (epilogue == Epilogue::GELU_TANH || epilogue == Epilogue::GELU_ERF) {
            bias = Matrix(static_cast<size_t>(n), 0.5F);
        }
        const Matrix        got = run_linear(kernels, operands, bias, residual, m, n, epilogue);
        std::vector<double> want(stood.size());
        for (size_t i = 0; i < want.size(); i++) {
            want[i] = epilogue_of(stood[i] + bias[i % static_cast<size_t>(n)], residual[i], epilogue);
        }
        const double error = relative_error(want, got);
        // A GELU whose result is going to be rounded to 8 bits is computed less exactly.
        const double limit = operand == Operand::INT8 && epilogue == Epilogue::GELU_TANH ? 4e-4 : 1e-5;
        check(error < limit,
              label + " epilogue " + std::to_string(static_cast<int>(epilogue)) + ": error " + std::to_string(error));
    }
    const Matrix zero(static_cast<size_t>(n), 0.0F);
    const Matrix got   = run_linear(kernels, operands, zero, residual, m, n, Epilogue::NONE);
    const double error = relative_error(exact, got);
    const double limit = operand == Operand::INT8 ? 0.05 : operand == Operand::BF16 ? 0.008 : 1e-5;
    check(error < limit, label + ": far from the exact product, error " + std::to_string(error));
}

// The largest values that can meet: no sum may saturate.
void test_extremes(const Kernels & kernels) {
    const int64_t m = 11, n = 70, k = 4352;
    for (const float sign : { 1.0F, -1.0F }) {
        Matrix x(static_cast<size_t>(m * k), 100.0F);
        Matrix w(static_cast<size_t>(n * k), sign * 3.0F);
        for (size_t i = 0; i < x.size(); i += static_cast<size_t>(k)) {
            x[i] = 0.0F;  // so that the others become the largest number
        }
        const Operands operands = pack(kernels, kernels.packing(Operand::INT8, k, 0), x, w, m, n, signed_rows(kernels));
        const Matrix   none(static_cast<size_t>(m * n), 0.0F);
        const Matrix   got  = run_linear(kernels, operands, none, none, m, n, Epilogue::NONE);
        const auto     want = product({ x.begin(), x.end() }, { w.begin(), w.end() }, m, n, k);
        check(relative_error(want, got) < 1e-5, std::string(kernels.name) + " int8 saturates");
    }
}

void test_not_numbers(const Kernels & kernels, Operand operand) {
    const int64_t m = 10, n = 20, k = 100;
    for (const float bad : { std::nanf(""), INFINITY }) {
        Matrix x                           = random_matrix(m, k, 5);
        Matrix w                           = random_matrix(n, k, 6);
        x[static_cast<size_t>(3 * k + 99)] = bad;
        w[static_cast<size_t>(7 * k + 42)] = bad;
        const Operands operands = pack(kernels, kernels.packing(operand, k, 32), x, w, m, n, signed_rows(kernels));
        const Matrix   none(static_cast<size_t>(m * n), 0.0F);
        const Matrix   got = run_linear(kernels, operands, none, none, m, n, Epilogue::NONE);
        for (int64_t r = 0; r < m; r++) {
            for (int64_t c = 0; c < n; c++) {
                const bool finite = std::isfinite(got[static_cast<size_t>(r * n + c)]);
                check(finite == (r != 3 && c != 7), std::string(kernels.name) + " " + operand_name(operand) +
                                                        ": a value that is no number at " + std::to_string(r) + "," +
                                                        std::to_string(c));
            }
        }
    }
}

void test_norm(const Kernels & kernels, int64_t k) {
    const Matrix      x      = random_matrix(3, k, 7);
    const Matrix      weight = random_matrix(1, k, 8);
    const Matrix      bias   = random_matrix(1, k, 9);
    const NormWeights norm{ weight.data(), bias.data(), 1e-6F };
    const Packing     p       = kernels.packing(Operand::F32, k, 0);
    const Memory      row     = allocate(p.row_bytes());
    const Memory      scratch = allocate(static_cast<size_t>(p.n_padded()) * 4);
    for (int64_t r = 0; r < 3; r++) {
        const float * values = x.data() + r * k;
        kernels.write_row(p, values, &norm, reinterpret_cast<float *>(scratch.get()), row.get());
        double mean = 0.0, variance = 0.0;
        for (int64_t i = 0; i < k; i++) {
            mean += values[i] / static_cast<double>(k);
        }
        for (int64_t i = 0; i < k; i++) {
            variance += (values[i] - mean) * (values[i] - mean) / static_cast<double>(k);
        }
        std::vector<double> want;
        for (int64_t i = 0; i < k; i++) {
            const auto at = static_cast<size_t>(i);
            want.push_back((values[i] - mean) / std::sqrt(variance + 1e-6) * weight[at] + bias[at]);
        }
        const auto * got = reinterpret_cast<const float *>(row.get());
        check(relative_error(want, { got, got + k }) < 1e-5,
              std::string(kernels.name) + " layer norm of " + std::to_string(k));
    }
}

void test_attention(const Kernels & kernels, Operand operand, int64_t n, int64_t d) {
    const int64_t stride = d + 5;
    Matrix        q      = random_matrix(n, stride, 10);
    Matrix        k      = random_matrix(n, stride, 11);
    const Matrix  v      = random_matrix(n, stride, 12);
    for (size_t i = 0; i < q.size(); i++) {
        q[i] *= 0.3F;
        k[i] = k[i] * 0.3F + (i % static_cast<size_t>(stride) == 3 ? 10.0F : 0.0F);  // one channel far off zero
    }
    Matrix              out(q.size(), -7.0F);
    const float         scale = 1.0F / std::sqrt(static_cast<float>(d));
    const AttentionTask task{ operand, q.data(), k.data(), v.data(), out.data(), n, d, stride, scale };
    const Memory        scratch = allocate(kernels.attention_scratch_bytes(task));
    kernels.attention(task, 0, n / 2, scratch.get());
    kernels.attention(task, n / 2, n, scratch.get());

    std::vector<double> want;
    Matrix              got;
    for (int64_t i = 0; i < n; i++) {
        std::vector<double> weights;
        double              total = 0.0, largest = -1e30;
        for (int64_t j = 0; j < n; j++) {
            double dot = 0.0;
            for (int64_t c = 0; c < d; c++) {
                dot += static_cast<double>(q[static_cast<size_t>(i * stride + c)]) *
                       k[static_cast<size_t>(j * stride + c)];
            }
            weights.push_back(dot * static_cast<double>(scale));
            largest = std::max(largest, weights.back());
        }
        for (double & weight : weights) {
            weight = std::exp(weight - largest);
            total += weight;
        }
        for (int64_t c = 0; c < d; c++) {
            double sum = 0.0;
            for (int64_t j = 0; j < n; j++) {
                sum += weights[static_cast<size_t>(j)] / total * v[static_cast<size_t>(j * stride + c)];
            }
            want.push_back(sum);
            got.push_back(out[static_cast<size_t>(i * stride + c)]);
        }
        for (int64_t c = d; c < stride; c++) {
            check(out[static_cast<size_t>(i * stride + c)] == -7.0F, "attention writes outside its head");
        }
    }
    const double error = relative_error(want, got);
    const double limit = operand == Operand::INT8 ? 0.06 : operand == Operand::BF16 ? 0.02 : 1e-5;
    check(error < limit, std::string(kernels.name) + " " + operand_name(operand) + " attention " + std::to_string(n) +
                             "x" + std::to_string(d) + ": error " + std::to_string(error));
}

double from_fp16(uint16_t half) {  // positive and normal
    return std::ldexp(1.0 + (half & 1023) / 1024.0, (half >> 10) - 15);
}

// A table with steps of different sizes, its middle at 128.
constexpr std::array<uint8_t, 16> CODEBOOK = {
    1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241
};
constexpr int ZERO = 128;

struct BlockwiseWeights {
    Memory              panels;
    std::vector<double> w;  // [n][k], what they stand for
};

// Reads what kernel.h says of the layout.
BlockwiseWeights random_blockwise(int64_t n, int64_t n_blocks, Blocks blocks, bool is_signed) {
    std::mt19937     random(3);
    const int64_t    k     = n_blocks * BLOCKWISE_BLOCK;
    const int64_t    bytes = blockwise_block_bytes(blocks);
    BlockwiseWeights result{ allocate(static_cast<size_t>(n / BLOCKWISE_COLUMNS * n_blocks * bytes)),
                             std::vector<double>(static_cast<size_t>(n * k)) };
    char *           at = result.panels.get();
    for (int64_t panel = 0; panel < n / BLOCKWISE_COLUMNS; panel++) {
        for (int64_t b = 0; b < n_blocks; b++, at += bytes) {
            const int64_t value_bytes = blockwise_value_bytes(blocks);
            for (int64_t i = 0; i < value_bytes; i++) {
                at[i] = static_cast<char>(random());
            }
            for (int64_t j = 0; j < BLOCKWISE_COLUMNS; j++) {
                const auto scale   = static_cast<uint16_t>(8 << 10 | (random() & 4095));
                const auto minimum = static_cast<uint16_t>(14 << 10 | (random() & 1023));
                double     less    = 0.0;
                std::memcpy(at + value_bytes + 2 * j, &scale, 2);
                if (blocks == Blocks::FOUR_WITH_MINIMUM) {
                    std::memcpy(at + value_bytes + 32 + 2 * j, &minimum, 2);
                    less = from_fp16(minimum);
                }
                for (int64_t i = 0; i < BLOCKWISE_BLOCK; i++) {
                    int q = 0;
                    if (blocks == Blocks::EIGHT) {
                        const char byte = at[i / 4 * 64 + j * 4 + i % 4];
                        q = is_signed ? static_cast<signed char>(byte) : static_cast<unsigned char>(byte) - ZERO;
                    } else {
                        const auto byte = static_cast<unsigned char>(at[i % 16 / 4 * 64 + j * 4 + i % 4]);
                        q               = CODEBOOK[i < 16 ? byte & 15 : byte >> 4] - ZERO;
                    }
                    result.w[static_cast<size_t>((panel * BLOCKWISE_COLUMNS + j) * k + b * BLOCKWISE_BLOCK + i)] =
                        from_fp16(scale) * q - less;
                }
            }
        }
    }
    return result;
}

Matrix blockwise_product(const Kernels & kernels, const BlockwiseWeights & weights, const Matrix & x, int64_t m,
                         int64_t n, int64_t n_blocks, Blocks blocks, std::vector<double> * stands_for = nullptr) {
    std::array<uint8_t, 16> codebook = CODEBOOK;
    if (kernels.blockwise.is_signed) {
        for (uint8_t & value : codebook) {
            value = static_cast<uint8_t>(value - ZERO);
        }
    }
    Matrix              out(static_cast<size_t>(m * n));
    const Memory        rows = allocate(static_cast<size_t>(n_blocks * blockwise_rows_bytes(m)));
    const BlockwiseTask task{ weights.panels.get(),
                              rows.get(),
                              out.data(),
                              m,
                              n,
                              n_blocks,
                              codebook.data(),
                              kernels.blockwise.is_signed ? 0 : ZERO,
                              blocks };
    for (int64_t r = 0; r < m; r++) {
        kernels.blockwise.write_row(task, x.data() + r * n_blocks * BLOCKWISE_BLOCK, r);
    }
    kernels.blockwise.linear(task, 0, n / BLOCKWISE_COLUMNS);
    for (int64_t r = 0; stands_for != nullptr && r < m; r++) {
        for (int64_t i = 0; i < n_blocks * BLOCKWISE_BLOCK; i++) {
            const char * block = rows.get() + i / BLOCKWISE_BLOCK * blockwise_rows_bytes(m);
            float        scale = 0.0F;
            std::memcpy(&scale, block + m * BLOCKWISE_BLOCK + 4 * r, 4);
            stands_for->push_back(static_cast<double>(scale) *
                                  static_cast<signed char>(block[r * BLOCKWISE_BLOCK + i % BLOCKWISE_BLOCK]));
        }
    }
    return out;
}

void test_blockwise(const Kernels & kernels, int64_t m, int64_t n, int64_t n_blocks, Blocks blocks) {
    const std::string name = std::string(kernels.name) + " blockwise " + std::to_string(m) + "x" + std::to_string(n) +
                             "x" + std::to_string(n_blocks) + " of kind " + std::to_string(static_cast<int>(blocks));
    const int64_t          k       = n_blocks * BLOCKWISE_BLOCK;
    const BlockwiseWeights weights = random_blockwise(n, n_blocks, blocks, kernels.blockwise.is_signed);
    Matrix                 x       = random_matrix(m, k, 1);
    std::vector<double>    stands_for;
    const Matrix           out = blockwise_product(kernels, weights, x, m, n, n_blocks, blocks, &stands_for);
    check(relative_error(product(stands_for, weights.w, m, n, k), out) < 2e-6, name);
    check(relative_error(stands_for, x) < 0.02, name + ": rows");
    for (int64_t r = 0; r < m; r++) {  // alone and among others
        const Matrix row(x.begin() + r * k, x.begin() + (r + 1) * k);
        const Matrix alone = blockwise_product(kernels, weights, row, 1, n, n_blocks, blocks);
        check(std::memcmp(alone.data(), out.data() + r * n, static_cast<size_t>(n) * 4) == 0, name + ": alone");
    }
    x[0]                  = std::nanf("");
    x[1]                  = INFINITY;
    const Matrix poisoned = blockwise_product(kernels, weights, x, m, n, n_blocks, blocks);
    for (int64_t i = 0; i < m * n; i++) {
        const bool is_nan = std::isnan(poisoned[static_cast<size_t>(i)]);
        check(is_nan == (i < n), name + ": not a number");
    }
}

uint16_t to_fp16(float value) {  // what is representable, or nearly so, and normal
    uint32_t word = 0;
    std::memcpy(&word, &value, 4);
    const uint32_t exponent = (word >> 23 & 255) - 112;
    return exponent > 30 ? 0 : static_cast<uint16_t>((word >> 16 & 0x8000) | exponent << 10 | (word >> 13 & 1023));
}

double signed_fp16(uint16_t half) {
    return half == 0 ? 0.0 : (half & 0x8000 ? -1.0 : 1.0) * from_fp16(half & 0x7fff);
}

// Queries that see every second cell, the first of them only one.
void test_cached_attention(const Kernels & kernels, int64_t n_queries, int64_t n_cells, int64_t n_heads,
                           int64_t n_heads_kv, int64_t d) {
    const Matrix          q = random_matrix(n_queries * n_heads, d, 1);
    std::vector<uint16_t> k, v, mask(static_cast<size_t>(n_queries * n_cells), 0xfc00);
    for (const float value : random_matrix(n_cells * n_heads_kv, d, 2)) {
        k.push_back(to_fp16(value));
    }
    for (const float value : random_matrix(n_cells * n_heads_kv, d, 3)) {
        v.push_back(to_fp16(value));
    }
    for (int64_t i = 0; i < n_queries * n_cells; i++) {
        const int64_t query = i / n_cells, cell = i % n_cells;
        if (query == 0 ? cell == n_cells - 1 : cell % 2 == query % 2 && cell > 0) {
            mask[static_cast<size_t>(i)] = 0;
        }
    }
    Matrix                    out(static_cast<size_t>(n_queries * n_heads * d), -1.0F);
    const auto                row = static_cast<size_t>(d) * 2;
    const CachedAttentionTask task{ reinterpret_cast<const char *>(q.data()),
                                    static_cast<size_t>(n_heads * d) * 4,
                                    static_cast<size_t>(d) * 4,
                                    reinterpret_cast<const char *>(k.data()),
                                    row * static_cast<size_t>(n_heads_kv),
                                    row,
                                    reinterpret_cast<const char *>(v.data()),
                                    row * static_cast<size_t>(n_heads_kv),
                                    row,
                                    reinterpret_cast<const char *>(mask.data()),
                                    static_cast<size_t>(n_cells) * 2,
                                    out.data(),
                                    n_heads,
                                    n_heads_kv,
                                    n_cells,
                                    d,
                                    0.1F };
    const std::string name = std::string(kernels.name) + " cached attention " + std::to_string(n_queries) + "x" +
                             std::to_string(n_cells) + "x" + std::to_string(n_heads) + "/" +
                             std::to_string(n_heads_kv) + "x" + std::to_string(d);
    check(kernels.cached_attention.takes(task), name + ": taken");
    const Memory scratch = allocate(kernels.cached_attention.scratch_bytes(task));
    for (int64_t i = 0; i < n_queries * n_heads_kv; i++) {
        kernels.cached_attention.run(task, i / n_heads_kv, i % n_heads_kv, scratch.get());
    }
    std::vector<double> want;
    for (int64_t query = 0; query < n_queries; query++) {
        for (int64_t head = 0; head < n_heads; head++) {
            const int64_t       group = n_heads / n_heads_kv;
            std::vector<double> values(static_cast<size_t>(d));
            double              sum = 0.0;
            for (int64_t cell = 0; cell < n_cells; cell++) {
                if (mask[static_cast<size_t>(query * n_cells + cell)] != 0) {
                    continue;
                }
                const int64_t at      = (cell * n_heads_kv + head / group) * d;
                double        product = 0.0;
                for (int64_t i = 0; i < d; i++) {
                    product += static_cast<double>(q[static_cast<size_t>((query * n_heads + head) * d + i)]) *
                               signed_fp16(k[static_cast<size_t>(at + i)]);
                }
                const double weight = std::exp(product * static_cast<double>(0.1F) - 60.0);
                sum += weight;
                for (int64_t i = 0; i < d; i++) {
                    values[static_cast<size_t>(i)] += weight * signed_fp16(v[static_cast<size_t>(at + i)]);
                }
            }
            for (const double value : values) {
                want.push_back(value / sum);
            }
        }
    }
    check(relative_error(want, out) < 1e-5, name);
}

void test(const Kernels & kernels) {
    const int before = failures;
    for (const Operand operand : { Operand::INT8, Operand::BF16, Operand::F32 }) {
        for (const auto & [m, n, k] : std::vector<std::array<int64_t, 3>>{ { 1, 1, 1 },
                                                                           { 2, 3, 5 },
                                                                           { 9, 48, 64 },
                                                                           { 10, 49, 100 },
                                                                           { 30, 130, 538 },
                                                                           { 17, 96, 1152 },
                                                                           { 8, 65, 4304 } }) {
            for (const int64_t block : { 0, 32, 576 }) {
                if (operand == Operand::INT8 || block == 0) {
                    test_linear(kernels, operand, m, n, k, block);
                }
            }
        }
        test_not_numbers(kernels, operand);
        for (const auto & [n, d] :
             std::vector<std::array<int64_t, 2>>{ { 1, 8 }, { 9, 72 }, { 81, 32 }, { 131, 72 }, { 50, 17 } }) {
            test_attention(kernels, operand, n, d);
        }
    }
    for (const int64_t m : { 1, 2, 7, 64, 67 }) {
        for (const auto & [n, n_blocks] : std::vector<std::array<int64_t, 2>>{ { 16, 1 }, { 48, 3 }, { 32, 28 } }) {
            for (const Blocks blocks : { Blocks::FOUR, Blocks::FOUR_WITH_MINIMUM, Blocks::EIGHT }) {
                if (kernels.blockwise.linear != nullptr) {
                    test_blockwise(kernels, m, n, n_blocks, blocks);
                }
            }
        }
    }
    if (kernels.cached_attention.run != nullptr) {
        for (const int64_t n_cells : { 3, 16, 200 }) {
            test_cached_attention(kernels, 3, n_cells, 14, 2, 64);
            test_cached_attention(kernels, 2, n_cells, 4, 4, 128);
        }
    }
    test_extremes(kernels);
    for (const int64_t k : { 1, 15, 16, 33, 1152 }) {
        test_norm(kernels, k);
    }
    std::printf("%-14s %s\n", kernels.name, failures == before ? "ok" : "FAILED");
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void speed(const Kernels & kernels) {
    for (const Operand operand : { Operand::INT8, Operand::BF16, Operand::F32 }) {
        const MicroKernel & micro = kernels.micro[static_cast<int>(operand)];
        double              peak  = 0.0;
        for (int i = 0; i < 5; i++) {
            const double start = seconds();
            const double ops   = micro.peak(2000000);
            peak               = std::max(peak, ops / (seconds() - start));
        }
        std::printf("%-14s %-5s peak %7.1f GOP/s", kernels.name, operand_name(operand), peak / 1e9);
        for (const auto & [n, k, block] : std::vector<std::array<int64_t, 3>>{ { 1152, 1152, 576 },
                                                                               { 4352, 1152, 576 },
                                                                               { 1152, 4352, 576 },
                                                                               { 1152, 1152, 0 },
                                                                               { 1152, 1152, 32 } }) {
            if (operand != Operand::INT8 && block != 576) {
                continue;
            }
            const int64_t    m = 729;
            const Matrix     x = random_matrix(m, k, 1);
            const Matrix     w = random_matrix(n, k, 2);
            const Matrix     bias(static_cast<size_t>(n), 0.0F);
            const Operands   operands = pack(kernels, kernels.packing(operand, k, block), x, w, m, n, false);
            double           best     = 1e9;
            Matrix           out(static_cast<size_t>(m * n));
            const LinearTask task{ operands.packing,
                                   operands.rows.get(),
                                   operands.panels.get(),
                                   bias.data(),
                                   bias.data(),
                                   out.data(),
                                   m,
                                   n,
                                   Epilogue::NONE };
            for (int i = 0; i < 7; i++) {
                const double start = seconds();
                for (int64_t panel = 0; panel * operands.packing.nr < n; panel++) {
                    kernels.linear(task, panel, 0, m);
                }
                best = std::min(best, seconds() - start);
            }
            const double rate = 2.0 * static_cast<double>(m * n * k) / best;
            std::printf("  %ldx%ld/%ld %6.1f (%.0f %%)", static_cast<long>(k), static_cast<long>(n),
                        static_cast<long>(block), rate / 1e9, 100 * rate / peak);
        }
        const int64_t n = 729, d = 72, stride = 1152;
        const Matrix  q = random_matrix(n, stride, 10), k = random_matrix(n, stride, 11),
                     v = random_matrix(n, stride, 12);
        Matrix              out(q.size());
        const AttentionTask task{ operand, q.data(), k.data(), v.data(), out.data(), n, d, stride, 0.118F };
        const Memory        scratch = allocate(kernels.attention_scratch_bytes(task));
        double              best    = 1e9;
        for (int i = 0; i < 7; i++) {
            const double start = seconds();
            kernels.attention(task, 0, n, scratch.get());
            best = std::min(best, seconds() - start);
        }
        std::printf("  attention %.3f ms (%.1f GOP/s)\n", best * 1e3,
                    4.0 * static_cast<double>(n * n * d) / best / 1e9);
    }
    for (const int64_t m : { 1, 2, 8, 119 }) {
        if (kernels.blockwise.linear == nullptr) {
            continue;
        }
        const int64_t          n = 4864, n_blocks = 28;
        const BlockwiseWeights weights = random_blockwise(n, n_blocks, Blocks::FOUR, kernels.blockwise.is_signed);
        const Matrix           x       = random_matrix(m, n_blocks * BLOCKWISE_BLOCK, 1);
        double                 best    = 1e9;
        for (int i = 0; i < 20; i++) {
            const double start = seconds();
            blockwise_product(kernels, weights, x, m, n, n_blocks, Blocks::FOUR);
            best = std::min(best, seconds() - start);
        }
        std::printf("%-14s 4-bit %3ld rows %6.1f GOP/s\n", kernels.name, static_cast<long>(m),
                    2.0 * static_cast<double>(m * n * n_blocks * BLOCKWISE_BLOCK) / best / 1e9);
    }
}

}  // namespace
}  // namespace omnivlm

int main(int argc, char ** argv) {
    using namespace omnivlm;
    const bool               measure = argc > 1 && std::strcmp(argv[1], "--speed") == 0;
    std::vector<std::string> wanted(argv + (measure ? 2 : 1), argv + argc);
    for (const Kernels * kernels : all_kernels()) {
        const auto place = std::find(wanted.begin(), wanted.end(), kernels->name);
        if (place == wanted.end() && !wanted.empty()) {
            continue;
        }
        if (!kernels->supported()) {
            check(place == wanted.end(), std::string(kernels->name) + " is not supported by this machine");
            std::printf("%-14s not supported by this machine\n", kernels->name);
        } else if (measure) {
            speed(*kernels);
        } else {
            test(*kernels);
        }
    }
    return std::min(failures, 100);
}
