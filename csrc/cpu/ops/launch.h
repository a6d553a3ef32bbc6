// From tensors to kernels: checks, layouts, the split over threads, partial sums and their merge. Used by all of ops/.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>

#include "../../tensor.h"
#include "../kernels/kernels.h"

namespace fused_resnet::cpu {

constexpr MemoryFormat kRows = MemoryFormat::ChannelsLast, kPlanes = MemoryFormat::Contiguous;

// The sizes and the layout of a tensor [N, C, H, W], which need not exist.
struct Image {
    int64_t count, channels, height, width;
    bool rows, planes;  // whether it is dense as channels_last, as NCHW

    explicit Image(const Tensor& t) {
        const IntList n = t.sizes(), s = t.strides();
        FR_CHECK(n.size() == 4, "expected [N, C, H, W], got ", n);
        count = n[0], channels = n[1], height = n[2], width = n[3];
        rows = is_dense(n, s, kRows), planes = is_dense(n, s, kPlanes);
    }
    Image(int64_t count, int64_t channels, int64_t height, int64_t width, MemoryFormat format)
        : count(count), channels(channels), height(height), width(width) {
        const bool both = channels == 1 || height * width == 1;
        rows = both || format == kRows, planes = both || format == kPlanes;
    }
    // channels_last, unless it is NCHW only. If it is both: rows for 1x1 images, planes for one channel.
    MemoryFormat format() const {
        FR_CHECK(rows || planes, "expected a dense NCHW or channels_last tensor");
        if (rows && planes) return height * width == 1 ? kRows : kPlanes;
        return rows ? kRows : kPlanes;
    }
};
inline MemoryFormat format_of(const Tensor& t) { return Image(t).format(); }

// A view of a tensor as `blocks` runs of memory, or of some of its rows.
struct View {
    Layout layout;
    int64_t blocks;
    static View of(const Image& image) {
        const int64_t C = image.channels, plane = image.height * image.width;
        if (image.format() == kRows) return {{C, 0}, image.count * plane};
        return {{C, plane}, image.count * C};
    }
    static View of(const Tensor& t) { return of(Image(t)); }
    MemoryFormat format() const { return layout.plane ? kPlanes : kRows; }
    int64_t size() const { return layout.plane ? layout.plane : layout.channels; }
};

inline char* bytes(const Tensor& t, int64_t elements = 0) {
    return static_cast<char*>(t.data_ptr()) + elements * t.element_size();
}

// Of t's sizes, in another dtype.
inline Tensor empty_like(const Tensor& t, ScalarType dtype, MemoryFormat format) {
    return empty(t.sizes(), t.options().dtype(dtype), format);
}

// [scale, shift] or [scale, shift, center], contiguous, of the wide dtype.
void set_norm(Affine& to, TensorList norm, const Tensor& y);

// Memory of a call, undefined, from the start of a cache line on.
class Memory {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory;

  public:
    Memory() = default;
    explicit Memory(int64_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
        FR_CHECK(memory || bytes == 0, "no memory for ", bytes, " bytes");
    }
    template <class T = void>
    T* at() const {
        return static_cast<T*>(memory.get());
    }
};

inline int64_t thread_count() {
    uint32_t count = 1;
    check(torch_get_num_threads(&count), "get_num_threads");
    return count;
}

// Whether the calling thread runs a part of a loop of `parallel`.
inline thread_local bool in_parallel = false;

// PyTorch's parallel_for, for a body that works on raw memory. The other threads lack the caller's thread-local state
// (inference mode, grad mode, dispatch keys), so the body must call no operator and make no tensor.
template <class Body>
void parallel(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    struct Loop {
        const Body& body;
        int64_t size;
        std::mutex mutex;
        std::exception_ptr error;  // PyTorch would keep its text alone
    } loop{body, end - begin, {}, {}};
    const auto part = [](int64_t first, int64_t last, void* context) {
        Loop& loop = *static_cast<Loop*>(context);
        const bool before = in_parallel;
        in_parallel = before || last - first < loop.size;
        try {
            loop.body(first, last);
        } catch (...) {
            const std::lock_guard<std::mutex> guard(loop.mutex);
            loop.error = std::current_exception();
        }
        in_parallel = before;
    };
    check(torch_parallel_for(begin, end, grain, part, &loop), "a loop");
    if (loop.error) std::rethrow_exception(loop.error);
}

// Rows per chunk of a reduction, whatever the number of threads, so that the bits depend on the shape alone: whole
// tiles of gemm, and of few rows several chunks.
inline int64_t chunk_rows(int64_t rows) { return rows < 64 * kGemmBlock ? kGemmBlock / 3 : kGemmBlock; }

// Sums of chunks, of several kinds, and their merge into vectors.
struct Sums {
    int kinds;
    int64_t chunks, channels;
    ScalarType dtype;
    Memory data;  // [kinds, chunks, channels]

    Sums(int kinds, int64_t chunks, int64_t channels, ScalarType dtype)
        : kinds(kinds),
          chunks(chunks),
          channels(channels),
          dtype(dtype),
          data(kinds * chunks * channels * element_size(dtype)) {}
    // Sets the sums of chunk `i` in a kernel's arguments.
    void aim(Args& args, int64_t i) const {
        for (int k = 0; k < kinds; k++)
            args.sums[k] = data.at<char>() + (k * chunks + i) * channels * element_size(dtype);
    }
    Tensor sum(int kind) const;
};

// Sums (or moments) of ranges of rows or planes.
struct Partials : Sums {
    int64_t rows, chunk, planes;

    Partials(const View& view, int kinds, ScalarType dtype);
    // mean and biased variance; every chunk's count is known
    std::pair<Tensor, Tensor> moments(int64_t plane) const;
};

// Bytes of a core's second cache.
int64_t l2_bytes();

using Kernel = void (*)(const Args&, int64_t, int64_t);

// kernel over all blocks of `view`, in parallel.
void run(Kernel kernel, const Args& args, const View& view);
// to += from, which has its sizes.
void add_to(const Tensor& to, const Tensor& from);
// kernel over chunks [first, last) of a reduction.
void reduce(Kernel kernel, const Args& args, const Partials& partials, int64_t first, int64_t last);

}  // namespace fused_resnet::cpu
