#include "product.h"

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "ops.h"

namespace fused_resnet::cpu {

namespace {

// Multiplications that repay another thread.
constexpr int64_t kWorth = 1 << 18;

// Values of a right operand that are packed at once.
constexpr int64_t kPacked = 1 << 20;

// Memory that grows.
class Growing {
    Memory memory;
    int64_t size = 0;

  public:
    float* at_least(int64_t floats) {
        if (size < floats) {
            memory = Memory(), size = 0;  // what it held need not be kept
            memory = Memory(floats * sizeof(float));
            size = floats;
        }
        return memory.at<float>();
    }
};

}  // namespace

float* scratch(int64_t floats) {
    thread_local Growing memory;
    return memory.at_least(floats);
}

float* gemm_scratch(int64_t more) {
    thread_local Growing memory;
    return memory.at_least(kGemmScratch + more);
}

bool multiplies_bf16() { return table().bf16_gemm.word > 1; }

ScalarType multiplied_as(ScalarType dtype) {
    return dtype == ScalarType::BFloat16 && !multiplies_bf16() ? ScalarType::Float : dtype;
}

namespace {

// Of weights [blocks, R, S, C, columns] whose runs are whole words. There is a gap after a run that is not.
std::array<int64_t, 5> run_strides(IntList sizes, ScalarType multiplied) {
    const int64_t word = sizeof(float) / element_size(multiplied), C = sizes[3], columns = sizes[4];
    const int64_t run = (sizes[2] * C + word - 1) / word * word * columns;
    return {sizes[1] * run, run, C * columns, columns, 1};
}

}  // namespace

Tensor pack_runs(const Tensor& weight) {
    const ScalarType type = multiplied_as(weight.scalar_type());
    const Tensor from = weight.to(type).contiguous();
    const auto strides = run_strides(from.sizes(), type);
    const int64_t blocks = from.size(0), R = from.size(1), run = from.size(2) * from.size(3), columns = from.size(4);
    const Tensor memory = empty({blocks * strides[0]}, from.options());
    const int64_t size = element_size(type), word = sizeof(float) / size;
    std::memset(memory.data_ptr(), 0, blocks * strides[0] * size);
    for (int64_t i = 0; i < blocks * R; i++)
        for (int64_t j = 0; j < run; j++)
            for (int64_t k = 0; k < columns; k++)
                std::memcpy(bytes(memory, i * strides[1] + (j / word * columns + k) * word + j % word),
                            bytes(from, (i * run + j) * columns + k), size);
    return memory.view(from.sizes(), strides);
}

bool is_packed_runs(const Tensor& packed, ScalarType images) {
    if (packed.dim() != 5 || packed.scalar_type() != multiplied_as(images)) return false;
    const auto strides = run_strides(packed.sizes(), packed.scalar_type());
    return std::equal(strides.begin(), strides.end(), packed.strides().begin());
}

const GemmKernel* gemm_kernel_of(ScalarType dtype) {
    if (dtype == ScalarType::Float) return &table().float_gemm;
    // oneDNN's products on AMX's tiles take a fraction of the time
    return dtype == ScalarType::BFloat16 && multiplies_bf16() && !has_amx_bf16() ? &table().bf16_gemm : nullptr;
}

int64_t panels_of(const GemmKernel& kernel, int64_t columns) { return (columns + kernel.columns - 1) / kernel.columns; }

int64_t panels_bytes(const GemmKernel& kernel, int64_t depth, int64_t columns) {
    return panels_of(kernel, columns) * ((depth + kernel.word - 1) / kernel.word) * kernel.columns * sizeof(float);
}

Memory pack(const GemmKernel& kernel, const Matrix& b) {
    Memory packed(panels_bytes(kernel, b.rows, b.columns));
    pack(kernel, {b.rows, b.columns, b.data, b.row, b.column, packed.at()}, 0, b.rows);
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
    const int64_t there = in_parallel ? 1 : thread_count(),
                  threads = std::min<int64_t>(there, 1 + g.rows * g.columns * g.depth / kWorth);
    // parts of rows and of columns: the largest part as small as it can be, and then what it reads
    int64_t row_parts = 0, column_parts = 0;
    auto least = std::pair(std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max());
    for (int64_t r = std::min(tiles, threads); r > 0; r--) {
        const int64_t c = std::max<int64_t>(1, std::min(panels, threads / r));
        const int64_t down = (tiles + r - 1) / r, across = (panels + c - 1) / c;
        const auto part = std::pair(down * across, down * height + across * kernel.columns);
        if (part < least) least = part, row_parts = r, column_parts = panels ? c : 0;
    }
    parallel(0, row_parts * column_parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / column_parts, column = i % column_parts;
            const int64_t left = panels * column / column_parts, right = panels * (column + 1) / column_parts;
            const int64_t sums = g.c ? 0 : kGemmBlock * odd_lines((right - left) * kernel.columns);
            kernel.gemm(g, gemm_scratch(g.transposed ? kGemmPatches : sums), tiles * row / row_parts * height,
                        std::min(g.rows, tiles * (row + 1) / row_parts * height), left, right);
        }
    });
}

void multiply_packing(const GemmKernel& kernel, Gemm g, const Matrix& b, ScalarType dtype) {
    const int64_t size = element_size(dtype), depth = b.rows, unit = kMostGemmDepth * kernel.word,
                  slice = std::max<int64_t>(1, kPacked / std::max<int64_t>(1, b.columns) / unit) * unit;
    const char *left = static_cast<const char*>(g.a), *right = static_cast<const char*>(b.data);
    for (int64_t k = 0; k == 0 || k < depth; k += slice) {
        g.depth = std::min(slice, depth - k);
        const Matrix part{const_cast<char*>(right + k * b.row * size), g.depth, b.columns, b.row, b.column};
        const Memory packed = pack(kernel, part);
        g.a = left + k * g.a_depth * size;
        g.a_start = k;
        g.b = packed.at();
        multiply(kernel, g);
        g.accumulate = true;
    }
}

void matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
    const ScalarType dtype = a.scalar_type();
    const bool bf16 = dtype == ScalarType::BFloat16 && multiplies_bf16();
    const GemmKernel* const kernel = dtype == ScalarType::Float ? &table().float_gemm
                                     : bf16                     ? &table().bf16_gemm
                                                                : nullptr;
    FR_CHECK(a.dim() == 2 && kernel, "a: expected a float32 matrix", multiplies_bf16() ? ", or a bfloat16 one" : "",
             ", got ", dtype, " ", a.sizes());
    FR_CHECK(b.dim() == 2 && b.scalar_type() == dtype && b.size(0) == a.size(1), "b: expected a matrix of ", a.size(1),
             " rows in ", dtype, ", got ", b.scalar_type(), " ", b.sizes());
    FR_CHECK(out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.size(0) == a.size(0) &&
                 out.size(1) == b.size(1) && (out.stride(1) == 1 || out.size(1) <= 1),
             "out: expected [", a.size(0), ", ", b.size(1), "] in float32 with rows of adjacent values, got ",
             out.scalar_type(), " ", out.sizes());
    Gemm g{out.size(0),   out.size(1), 0,       a.data_ptr(),
           a.stride(0),   a.stride(1), nullptr, static_cast<float*>(out.data_ptr()),
           out.stride(0), accumulate};
    multiply_packing(*kernel, g, {b.data_ptr(), b.size(0), b.size(1), b.stride(0), b.stride(1)}, dtype);
}

}  // namespace fused_resnet::cpu
