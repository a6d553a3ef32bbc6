#include "product.h"

#include <memory>

#include "ops.h"

namespace fused_resnet::cpu {

namespace {

// Multiplications that repay another thread.
constexpr int64_t kWorth = 1 << 18;

// Values of a right operand that are packed at once.
constexpr int64_t kPacked = 1 << 20;

struct Free {
    void operator()(float* p) const { std::free(p); }
};

}  // namespace

float* scratch(int64_t floats) {
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset();  // what it held need not be kept
        size = (floats + 1023) / 1024 * 1024;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float))));
        TORCH_CHECK(memory, "no memory for ", size, " floats of scratch");
    }
    return memory.get();
}

Tensor pack(const Tensor& b) {
    const int64_t depth = b.size(0), panels = panels_of(b.size(1));
    const Tensor packed =
        at::empty({panels, depth, table().gemm_columns}, b.options().memory_format(at::MemoryFormat::Contiguous));
    const GemmPack q{depth,       b.size(1),   b.const_data_ptr<float>(),
                     b.stride(0), b.stride(1), packed.mutable_data_ptr<float>()};
    pack(q, 0, depth);
    return packed;
}

void pack(const GemmPack& q, int64_t begin, int64_t end) {
    parallel(begin, end, std::max<int64_t>(16, 65536 / std::max<int64_t>(1, q.columns)),
             [&](int64_t first, int64_t last) { table().gemm_pack(q, first, last, 0, panels_of(q.columns)); });
}

void multiply(const Gemm& g) {
    const int64_t height = table().gemm_rows, tiles = (g.rows + height - 1) / height, panels = panels_of(g.columns);
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + g.rows * g.columns * g.depth / kWorth);
    // as many parts of rows as there are threads, and where there are too few rows, parts of columns of them
    const int64_t row_parts = std::min(tiles, threads),
                  column_parts = row_parts ? std::min(panels, (threads + row_parts - 1) / row_parts) : 0;
    parallel(0, row_parts * column_parts, 1, [&](int64_t first, int64_t last) {
        float* const block = g.a_depth == 1 ? nullptr : scratch(kGemmScratch);
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / column_parts, column = i % column_parts;
            table().gemm(g, block, tiles * row / row_parts * height,
                         std::min(g.rows, tiles * (row + 1) / row_parts * height), panels * column / column_parts,
                         panels * (column + 1) / column_parts);
        }
    });
}

void matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
    for (const Tensor* t : {&a, &b, &out})
        TORCH_CHECK(t->dim() == 2 && t->scalar_type() == at::kFloat, "expected float32 matrices, got ",
                    t->scalar_type(), " ", t->sizes());
    TORCH_CHECK(a.size(1) == b.size(0), "b: expected ", a.size(1), " rows, got ", b.sizes());
    TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && (out.stride(1) == 1 || out.size(1) <= 1),
                "out: expected [", a.size(0), ", ", b.size(1), "] with rows of adjacent values, got ", out.sizes());
    const int64_t depth = a.size(1), slice = std::max(kMostGemmDepth, kPacked / std::max<int64_t>(1, out.size(1)) /
                                                                          kMostGemmDepth * kMostGemmDepth);
    for (int64_t k = 0; k == 0 || k < depth; k += slice) {
        const int64_t count = std::min(slice, depth - k);
        const Tensor packed = pack(b.narrow(0, k, count));
        multiply({out.size(0), out.size(1), count, a.const_data_ptr<float>() + k * a.stride(1), a.stride(0),
                  a.stride(1), packed.const_data_ptr<float>(), out.mutable_data_ptr<float>(), out.stride(0),
                  accumulate || k > 0});
    }
}

}  // namespace fused_resnet::cpu
