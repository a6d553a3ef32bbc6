#include "product.h"

#include <limits>
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

// Memory that grows.
class Memory {
    std::unique_ptr<float, Free> memory;
    int64_t size = 0;

  public:
    float* at_least(int64_t floats) {
        if (size < floats) {
            memory.reset();  // what it held need not be kept
            size = (floats + 1023) / 1024 * 1024;
            memory.reset(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float))));
            TORCH_CHECK(memory, "no memory for ", size, " floats of scratch");
        }
        return memory.get();
    }
};

}  // namespace

float* scratch(int64_t floats) {
    thread_local Memory memory;
    return memory.at_least(floats);
}

float* gemm_scratch() {
    thread_local Memory memory;
    return memory.at_least(kGemmScratch);
}

const GemmKernel* gemm_kernel_of(at::ScalarType dtype) {
    if (dtype == at::kFloat) return &table().float_gemm;
    // oneDNN's products on AMX's tiles take a fraction of the time
    return dtype == at::kBFloat16 && !has_amx_bf16() ? table().bf16_gemm : nullptr;
}

int64_t panels_of(const GemmKernel& kernel, int64_t columns) { return (columns + kernel.columns - 1) / kernel.columns; }

Tensor empty_panels(const GemmKernel& kernel, int64_t depth, int64_t columns, const at::TensorOptions& options) {
    return at::empty({panels_of(kernel, columns), (depth + kernel.word - 1) / kernel.word, kernel.columns, kernel.word},
                     options.memory_format(at::MemoryFormat::Contiguous));
}

Tensor pack(const GemmKernel& kernel, const Tensor& b) {
    const Tensor packed = empty_panels(kernel, b.size(0), b.size(1), b.options());
    pack(kernel, {b.size(0), b.size(1), b.const_data_ptr(), b.stride(0), b.stride(1), packed.mutable_data_ptr()}, 0,
         b.size(0));
    return packed;
}

void pack(const GemmKernel& kernel, const GemmPack& q, int64_t begin, int64_t end) {
    const int64_t word = kernel.word;  // no thread takes a part of one
    parallel(begin / word, (end + word - 1) / word,
             std::max<int64_t>(16, 65536 / std::max<int64_t>(1, q.columns)) / word, [&](int64_t first, int64_t last) {
                 kernel.pack(q, first * word, std::min(end, last * word), 0, panels_of(kernel, q.columns));
             });
}

void multiply(const GemmKernel& kernel, const Gemm& g) {
    const int64_t height = kernel.rows, tiles = (g.rows + height - 1) / height, panels = panels_of(kernel, g.columns);
    const int64_t there = at::in_parallel_region() ? 1 : at::get_num_threads(),
                  threads = std::min<int64_t>(there, 1 + g.rows * g.columns * g.depth / kWorth);
    // parts of rows and of columns: the largest part as small as it can be
    int64_t row_parts = 0, column_parts = 0, least = std::numeric_limits<int64_t>::max();
    for (int64_t r = std::min(tiles, threads); r > 0; r--) {
        const int64_t c = std::max<int64_t>(1, std::min(panels, threads / r));
        const int64_t part = (tiles + r - 1) / r * ((panels + c - 1) / c);
        if (part < least) least = part, row_parts = r, column_parts = panels ? c : 0;
    }
    parallel(0, row_parts * column_parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / column_parts, column = i % column_parts;
            kernel.gemm(g, gemm_scratch(), tiles * row / row_parts * height,
                        std::min(g.rows, tiles * (row + 1) / row_parts * height), panels * column / column_parts,
                        panels * (column + 1) / column_parts);
        }
    });
}

void matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
    const at::ScalarType dtype = a.scalar_type();
    const GemmKernel* const kernel = dtype == at::kFloat      ? &table().float_gemm
                                     : dtype == at::kBFloat16 ? table().bf16_gemm
                                                              : nullptr;
    TORCH_CHECK(a.dim() == 2 && kernel, "a: expected a float32 matrix", table().bf16_gemm ? ", or a bfloat16 one" : "",
                ", got ", dtype, " ", a.sizes());
    TORCH_CHECK(b.dim() == 2 && b.scalar_type() == dtype && b.size(0) == a.size(1), "b: expected a matrix of ",
                a.size(1), " rows in ", dtype, ", got ", b.scalar_type(), " ", b.sizes());
    TORCH_CHECK(out.dim() == 2 && out.scalar_type() == at::kFloat && out.size(0) == a.size(0) &&
                    out.size(1) == b.size(1) && (out.stride(1) == 1 || out.size(1) <= 1),
                "out: expected [", a.size(0), ", ", b.size(1), "] in float32 with rows of adjacent values, got ",
                out.scalar_type(), " ", out.sizes());
    const int64_t depth = a.size(1), unit = kMostGemmDepth * kernel->word,
                  slice = std::max<int64_t>(1, kPacked / std::max<int64_t>(1, out.size(1)) / unit) * unit;
    for (int64_t k = 0; k == 0 || k < depth; k += slice) {
        const int64_t count = std::min(slice, depth - k);
        const Tensor packed = pack(*kernel, b.narrow(0, k, count));
        const char* const left = static_cast<const char*>(a.const_data_ptr()) + k * a.stride(1) * a.element_size();
        multiply(*kernel, {out.size(0), out.size(1), count, left, a.stride(0), a.stride(1), packed.const_data_ptr(),
                           out.mutable_data_ptr<float>(), out.stride(0), accumulate || k > 0});
    }
}

}  // namespace fused_resnet::cpu
