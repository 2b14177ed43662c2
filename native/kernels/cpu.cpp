#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace omnivlm {
namespace {

CpuFeatures detect() {
    CpuFeatures found;
#if defined(__x86_64__)
    // Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID and XGETBV.
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0) {
        return found;
    }
    const auto bit     = [](unsigned word, int n) { return ((word >> n) & 1U) != 0; };
    const bool fma     = bit(c, 12);
    const bool osxsave = bit(c, 27);
    unsigned   saved   = 0;  // registers that the operating system saves
    if (osxsave) {
        unsigned high = 0;
        __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    }
    const bool ymm = (saved & 0x06U) == 0x06U;
    const bool zmm = (saved & 0xe6U) == 0xe6U;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
        return found;
    }
    const unsigned last_leaf = a;
    found.avx2               = ymm && fma && bit(b, 5);
    found.avx512             = found.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
    found.avx512_vnni        = found.avx512 && bit(c, 11);
    if (last_leaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) {
        found.avx_vnni    = found.avx2 && bit(a, 4);
        found.avx512_bf16 = found.avx512 && bit(a, 5);
    }
#elif defined(__aarch64__) && defined(__APPLE__)
    const auto has = [](const char * name) {
        int    value = 0;
        size_t size  = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    found.neon_dotprod = has("hw.optional.arm.FEAT_DotProd");
    found.neon_i8mm    = has("hw.optional.arm.FEAT_I8MM");
#elif defined(__aarch64__) && defined(__linux__)
    found.neon_dotprod = (getauxval(AT_HWCAP) & (1UL << 20)) != 0;   // HWCAP_ASIMDDP
    found.neon_i8mm    = (getauxval(AT_HWCAP2) & (1UL << 13)) != 0;  // HWCAP2_I8MM
#endif
    return found;
}

}  // namespace

const CpuFeatures & cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

bool has_avx512_vnni() {
    return cpu_features().avx512_vnni && cpu_features().avx512_bf16;
}

bool has_avx512() {
    return cpu_features().avx512;
}

bool has_avx_vnni() {
    return cpu_features().avx_vnni;
}

bool has_avx512_as_avx_vnni() {
    return cpu_features().avx512_vnni;
}

bool has_avx2() {
    return cpu_features().avx2;
}

bool has_neon_i8mm() {
    return cpu_features().neon_i8mm && cpu_features().neon_dotprod;
}

bool has_neon_dotprod() {
    return cpu_features().neon_dotprod;
}

bool always() {
    return true;
}

}  // namespace omnivlm
