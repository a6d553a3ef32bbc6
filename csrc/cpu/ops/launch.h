// From tensors to kernels: checks, layouts, the split over threads, partial sums and their merge. Used by all of ops/.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "../kernels/kernels.h"

namespace fused_resnet::cpu {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype_of(at::ScalarType t) {
    switch (t) {
        case at::kDouble: return DType::f64;
        case at::kFloat: return DType::f32;
        case at::kBFloat16: return DType::bf16;
        case at::kHalf: return DType::f16;
        default: TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64, got ", t);
    }
}
// The dtype of statistics and per-channel vectors.
inline at::ScalarType wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// channels_last, unless the tensor is NCHW only. If it is both: rows for 1x1 images, planes for one channel.
inline at::MemoryFormat format_of(const Tensor& t) {
    const bool rows = t.is_contiguous(at::MemoryFormat::ChannelsLast), planes = t.is_contiguous();
    TORCH_CHECK(rows || planes, "expected a dense NCHW or channels_last tensor");
    if (rows && planes)
        return t.size(2) * t.size(3) == 1 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return rows ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// A view of a tensor as `blocks` runs of memory, or of some of its rows.
struct View {
    Layout layout;
    int64_t blocks;
    static View of(const Tensor& t) {
        const int64_t C = t.size(1), plane = t.size(2) * t.size(3);
        if (format_of(t) == at::MemoryFormat::ChannelsLast) return {{C, 0}, t.size(0) * plane};
        return {{C, plane}, t.size(0) * C};
    }
    int64_t size() const { return layout.plane ? layout.plane : layout.channels; }
};

inline char* bytes(const Tensor& t, int64_t elements = 0) {
    return static_cast<char*>(t.data_ptr()) + elements * t.element_size();
}

Tensor empty_like(const Tensor& t, at::ScalarType dtype);

// [scale, shift] or [scale, shift, center], contiguous, of the wide dtype.
void set_norm(Affine& to, at::TensorList norm, const Tensor& y);
Act act_of(int64_t index);

// at::parallel_for for a body that works on raw memory. The other threads lack the caller's thread-local state
// (inference mode, grad mode, dispatch keys), so the body must call no ATen operator and make no tensor.
template <class Body>
void parallel(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    at::parallel_for(begin, end, grain, body);
}

// Rows per chunk of a reduction, whatever the number of threads, so that the bits depend on the shape alone: whole
// tiles of gemm, and of few rows several chunks.
inline int64_t chunk_rows(int64_t rows) { return rows < 64 * kGemmBlock ? kGemmBlock / 3 : kGemmBlock; }

// Sums (or moments) of ranges of rows or planes, and their merge into vectors.
struct Partials {
    Tensor data;  // [kinds, chunks, C]
    int64_t rows, chunk, planes;

    Partials(const View& view, int kinds, at::ScalarType dtype);
    int64_t chunks() const { return data.size(1); }
    // Runs `kernel` on chunk `i` with its sums set.
    void aim(Args& args, int64_t i) const;
    Tensor sum(int kind) const { return data[kind].sum(0); }
    // mean and biased variance; every chunk's count is known
    std::pair<Tensor, Tensor> moments(int64_t plane) const;
};

// Bytes of a core's second cache.
int64_t l2_bytes();

using Kernel = void (*)(const Args&, int64_t, int64_t);

// kernel over all blocks of `view`, in parallel.
void run(Kernel kernel, const Args& args, const View& view);
// kernel over chunks [first, last) of a reduction.
void reduce(Kernel kernel, const Args& args, const Partials& partials, int64_t first, int64_t last);

}  // namespace fused_resnet::cpu
