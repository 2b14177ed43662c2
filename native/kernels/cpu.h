// What the processor and the operating system offer, asked once.

#pragma once

namespace omnivlm {

struct CpuFeatures {
    bool avx2        = false;  // with FMA
    bool avx_vnni    = false;
    bool avx512      = false;  // F, BW, DQ and VL
    bool avx512_vnni = false;
    bool avx512_bf16 = false;

    bool neon_dotprod = false;
    bool neon_i8mm    = false;
};

const CpuFeatures & cpu_features();

}  // namespace omnivlm
