// Plain C++ for any machine: 4 lanes of 32 bits, which every compiler turns into what the baseline has.

#include "cpu.h"
#include "instruction-sets.h"
#include "loops.h"
#include "tile.h"

namespace omnivlm {
namespace {

using Lanes = int32_t __attribute__((vector_size(16)));

struct Portable {
    using Vector               = Lanes;
    using Operand              = Lanes;
    static constexpr int BYTES = 16;

    static Lanes zero() { return Lanes{}; }
    static void  store(char * p, const Lanes & v) { __builtin_memcpy(p, &v, sizeof v); }

    static Lanes load(const char * p) {
        Lanes v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }

    static Lanes broadcast(const char * p) {
        int32_t word;
        __builtin_memcpy(&word, p, 4);
        return Lanes{} + word;
    }

    static Lanes multiply_add(Lanes acc, Lanes a, Lanes b) {
        using Reals = float __attribute__((vector_size(16)));
        return bits<Lanes>(bits<Reals>(acc) + bits<Reals>(a) * bits<Reals>(b));
    }
};

struct Int8 : Portable {
    static constexpr int KP = 4, OPS = 32;

    // Signed times signed, byte by byte: each is shifted up to the sign and down again.
    static Lanes dot(Lanes acc, Lanes a, Lanes b) {
        acc += ((a << 24) >> 24) * ((b << 24) >> 24);
        acc += ((a << 16) >> 24) * ((b << 16) >> 24);
        acc += ((a << 8) >> 24) * ((b << 8) >> 24);
        return acc + (a >> 24) * (b >> 24);
    }
};

struct Bf16 : Portable {
    static constexpr int KP = 2, OPS = 16;

    static Lanes dot(Lanes acc, Lanes a, Lanes b) {
        const Lanes upper = Lanes{} + static_cast<int32_t>(0xffff0000U);
        acc               = multiply_add(acc, a << 16, b << 16);
        return multiply_add(acc, a & upper, b & upper);
    }
};

struct F32 : Portable {
    static constexpr int KP = 1, OPS = 8;

    static Lanes dot(Lanes acc, Lanes a, Lanes b) { return multiply_add(acc, a, b); }
};

struct Isa {
    static constexpr float    INT8_MAX_ROW  = 255.0F;
    static constexpr unsigned INT8_ROW_BIAS = 128;

    static constexpr MicroKernel int8() { return micro_kernel<Int8, 2, 4>(); }
    static constexpr MicroKernel bf16() { return micro_kernel<Bf16, 2, 4>(); }
    static constexpr MicroKernel f32() { return micro_kernel<F32, 2, 4>(); }
};

}  // namespace

constexpr Kernels PORTABLE = Loops<Isa>::table("portable", always);

}  // namespace omnivlm
