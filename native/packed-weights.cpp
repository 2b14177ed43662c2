#include "packed-weights.h"

#include "ggml-cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <future>
#include <new>

namespace omnivlm {
namespace {

constexpr size_t ALIGNMENT = 64;
constexpr size_t HUGE_PAGE = 2 << 20;

size_t round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

size_t floats_bytes(int64_t n) {
    return round_up(static_cast<size_t>(n) * sizeof(float), ALIGNMENT);
}

void to_float(const ggml_tensor * weight, const char * row, float * out, int64_t n) {
    switch (weight->type) {
    case GGML_TYPE_F16:  // the type's own to_float takes ten times as long
        return ggml_cpu_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(row), out, n);
    case GGML_TYPE_BF16:
        return ggml_cpu_bf16_to_fp32(reinterpret_cast<const ggml_bf16_t *>(row), out, n);
    default:
        return ggml_get_type_traits(weight->type)->to_float(row, out, n);
    }
}

}  // namespace

AlignedMemory allocate_aligned(size_t bytes) {
    const size_t  alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    const size_t  size      = round_up(std::max<size_t>(bytes, 1), alignment);
    AlignedMemory memory(static_cast<char *>(std::aligned_alloc(alignment, size)));
    if (!memory) {
        throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) {
        madvise(memory.get(), size, MADV_HUGEPAGE);  // fewer page faults and TLB misses; not vital
    }
#endif
    return memory;
}

size_t PackedShape::scratch_bytes() const {
    return floats_bytes(packing.n_in * packing.nr) + packing.panel_scratch_bytes();
}

void write_panel(const Kernels & kernels, const PackedShape & shape, const ggml_tensor * weight, int64_t panel,
                 char * scratch, char * panels) {
    const Packing & p        = shape.packing;
    const int64_t   first    = panel * p.nr;
    const int64_t   n        = std::min<int64_t>(p.nr, shape.n_out - first);
    const size_t    row_size = ggml_row_size(weight->type, p.n_in);
    const char *    data     = static_cast<const char *>(weight->data) + static_cast<size_t>(first) * row_size;
    auto *          floats   = reinterpret_cast<float *>(scratch);
    const float *   rows     = floats;
    if (weight->type == GGML_TYPE_F32) {
        rows = reinterpret_cast<const float *>(data);
    } else {
        for (int64_t j = 0; j < n; j++) {
            to_float(weight, data + static_cast<size_t>(j) * row_size, floats + j * p.n_in, p.n_in);
        }
    }
    kernels.write_panel(p, rows, p.n_in, static_cast<int>(n), scratch + floats_bytes(p.n_in * p.nr),
                        panels + static_cast<size_t>(panel) * p.panel_bytes());
}

PackedWeights::PackedWeights(const Kernels & kernels, const std::vector<Source> & sources, const MappedFile & file,
                             int n_threads) {
    struct Unit {
        const Source * source;
        int64_t        panel;
        char *         panels;
    };

    size_t total   = 0;
    size_t scratch = 0;
    for (const Source & source : sources) {
        total += source.shape.bytes();
        scratch = std::max(scratch, source.shape.scratch_bytes());
    }
    memory_ = allocate_aligned(total);

    std::vector<Unit>                 units;
    std::vector<std::atomic<int64_t>> left(sources.size());  // panels of each source
    char *                            at = memory_.get();
    for (size_t i = 0; i < sources.size(); i++) {
        const Source & source = sources[i];
        for (int64_t panel = 0; panel < source.shape.n_panels(); panel++) {
            units.push_back({ &source, panel, at });
        }
        panels_[source.weight] = at;
        left[i]                = source.shape.n_panels();
        at += source.shape.bytes();
    }

    std::atomic<size_t> next{ 0 };
    const auto          work = [&] {
        const AlignedMemory mine = allocate_aligned(scratch);
        for (size_t u = next++; u < units.size(); u = next++) {
            const Unit & unit = units[u];
            write_panel(kernels, unit.source->shape, unit.source->weight, unit.panel, mine.get(), unit.panels);
            if (--left[static_cast<size_t>(unit.source - sources.data())] == 0) {
                file.release(unit.source->weight->data, ggml_nbytes(unit.source->weight));
            }
        }
    };
    std::vector<std::future<void>> threads;
    for (int i = 0; i < n_threads; i++) {
        threads.push_back(std::async(std::launch::async, work));
    }
    for (std::future<void> & thread : threads) {
        thread.get();
    }
}

const char * PackedWeights::panels_of(const ggml_tensor * weight) const {
    const auto found = panels_.find(weight);
    return found == panels_.end() ? nullptr : found->second;
}

}  // namespace omnivlm
