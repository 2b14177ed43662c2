#include "peak.h"

#include <chrono>
#include <future>
#include <stdexcept>
#include <vector>

namespace omnivlm {
namespace {

constexpr int64_t ROUNDS  = 20000;  // well below a millisecond
constexpr double  SECONDS = 0.1;

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

double peak_gops(Precision precision, int n_threads) {
    if (precision == Precision::GGML) {
        return 0.0;
    }
    if (n_threads < 1) {
        throw std::invalid_argument("n_threads must be at least 1");
    }
    const Packing       packing = packing_of(best_kernels(), precision, Part::TOWER, 1);
    const MicroKernel & kernel  = best_kernels().micro[static_cast<int>(packing.operand)];

    const auto rate = [&kernel] {
        const double start   = now();
        double       elapsed = 0.0;
        double       done    = 0.0;
        while (elapsed < SECONDS) {
            done += kernel.peak(ROUNDS);
            elapsed = now() - start;
        }
        return done / elapsed;
    };
    std::vector<std::future<double>> threads;
    for (int i = 0; i < n_threads; i++) {
        threads.push_back(std::async(std::launch::async, rate));
    }
    double total = 0.0;
    for (std::future<double> & thread : threads) {
        total += thread.get();
    }
    return total / 1e9;
}

}  // namespace omnivlm
