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

// What each instruction set's kernels need. Not in their own files, whose code this machine may be unable to run.
bool has_avx512_vnni();  // with BF16
bool has_avx512();
bool has_avx_vnni();
bool has_avx512_as_avx_vnni();  // 256-bit VNNI in AVX-512's encoding, for tests
bool has_avx2();
bool has_neon_i8mm();
bool has_neon_dotprod();
bool always();

}  // namespace omnivlm
