// 1x1 convolutions of channels_last tensors: matrix products of some rows at a time, so that what is applied to their
// operands and results stays in cache. With products of our own every thread takes chunks of rows from the prologue to
// the epilogue; with ATen's, or of few rows, all threads take each step together.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>

#include "args.h"
#include "conv_list.h"
#include "product.h"

namespace fused_resnet::cpu {

namespace {

// Bytes of both operands that all threads take together.
constexpr int64_t kSlice = 8 << 20;
// The same per thread for dW, whose sums are read and written once per slice: at least so many rows, for the kernel
// reads them about as often.
constexpr int64_t kGradientSlice = 2 << 20, kGradientRows = 2 * kMostGemmDepth;
// Chunks of rows per thread from which each thread takes its own.
constexpr int64_t kChunksApart = 4;

// So many bytes of `size` each, as whole chunks, and slices of about the same size.
int64_t slice_rows(int64_t bytes, int64_t size, int64_t rows, int64_t chunk) {
    const int64_t most = std::max<int64_t>(1, bytes / (size * chunk)), chunks = (rows + chunk - 1) / chunk;
    const int64_t slices = std::max<int64_t>(1, (chunks + most - 1) / most);
    return (chunks + slices - 1) / slices * chunk;
}

char* row(const Tensor& t, int64_t i) { return bytes(t, i * t.size(1)); }

// Chunks of a piece that one thread takes for itself: whole blocks of the kernel, which reads the right operand once
// per block.
int64_t chunks_of_piece(int64_t chunk) { return std::max<int64_t>(1, kGemmBlock / chunk); }

// piece(begin, end) of rows [begin, end): at once, or apart, by pieces that every thread takes for itself. No piece
// crosses a border; borders are `slice` rows apart.
template <class Piece>
void in_pieces(bool apart, int64_t chunk, int64_t slice, int64_t begin, int64_t end, const Piece& piece) {
    if (!apart) return piece(begin, end);
    parallel(begin / chunk, (end + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first, next; i < last; i = next) {
            const int64_t border = (begin + ((i * chunk - begin) / slice + 1) * slice + chunk - 1) / chunk;
            next = std::min({last, border, i + chunks_of_piece(chunk)});
            piece(i * chunk, std::min(end, next * chunk));
        }
    });
}

// c (+)= a b by PyTorch, for dtypes that our kernels do not multiply.
void library_product(const Matrix& c, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
    const auto tensor = [&](const Matrix& m) {
        return from_memory(m.data, {m.rows, m.columns}, {m.row, m.column}, dtype);
    };
    const Tensor to = tensor(c), left = tensor(a), right = tensor(b);
    check(accumulate ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1, 1)
                     : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()),
          "a product");
}

// The weight of a 1x1 convolution as the right operand of products, in a dtype that they are computed in, packed for
// our kernel if it has one: [C, K], or, for the gradient of the input, [K, C].
class Right {
    const Tensor weight;
    const Matrix matrix;
    const GemmKernel* const kernel;
    Memory packed;

    static Matrix matrix_of(const Tensor& w, bool backward) {
        const Matrix m{w.data_ptr(), w.size(0), w.size(1), w.stride(0), w.stride(1)};
        return backward ? m : Matrix{m.data, m.columns, m.rows, m.column, m.row};
    }

  public:
    Right(const Tensor& given, ScalarType compute, bool backward)
        : weight(given.to(compute)), matrix(matrix_of(weight, backward)), kernel(gemm_kernel_of(compute)) {
        if (kernel) packed = pack(*kernel, matrix);
    }
    // out (+)= a b, rows of adjacent values; out is float with our kernel. A piece that one thread takes for itself may
    // call it then.
    void product(void* out, void* a, int64_t rows, bool accumulate) const {
        const int64_t depth = matrix.rows, columns = matrix.columns;
        if (kernel)
            return multiply(*kernel, {rows, columns, depth, a, depth, 1, packed.at(), static_cast<float*>(out), columns,
                                      accumulate});
        library_product({out, rows, columns, columns, 1}, {a, rows, depth, depth, 1}, matrix, weight.scalar_type(),
                        accumulate);
    }
};

// What a product's left operand is made of: x itself, x in another dtype, or act(s x + t).
struct Operand {
    const Tensor& x;
    Args pre{};
    bool prologue;
    ScalarType compute;

    Operand(const Tensor& x, TensorList norm, int64_t act, double act_param, ScalarType compute)
        : x(x), prologue(!norm.empty()), compute(compute) {
        if (prologue) pre = prologue_args(x, norm, act, act_param);
    }
    bool is_x() const { return !prologue && x.scalar_type() == compute; }
    // Rows [begin, end), in `to` where they are not x's own.
    char* rows(int64_t begin, int64_t end, void* to) const {
        if (is_x()) return row(x, begin);
        Args mine = prologue ? pre : raw_args(x);
        mine.y = row(x, begin);
        mine.out = to;
        mine.other_type = dtype_of(compute);
        run(prologue ? table().bn_act : table().convert, mine, {mine.layout, end - begin});
        return static_cast<char*>(to);
    }
};

// Memory for a piece's operand and products: of all threads together, or of the calling thread.
class Buffers {
    int64_t operand, size;  // bytes
    Memory shared;

  public:
    Buffers(bool apart, int64_t operand_bytes, int64_t product_bytes)
        : operand((operand_bytes + 63) / 64 * 64), size(operand + product_bytes) {
        if (!apart) shared = Memory(size);
    }
    std::pair<char*, char*> get() const {
        char* const start = shared.at() ? shared.at<char>() : reinterpret_cast<char*>(scratch((size + 3) / 4));
        return {start, start + operand};
    }
};

}  // namespace

bool is_gemm(const Image& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups) {
    return weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 && padding[0] == 0 && padding[1] == 0 &&
           x.format() == kRows;
}

Tensor strided(const Tensor& x, IntList stride) {
    if (stride[0] == 1 && stride[1] == 1) return x;
    return x.every(2, stride[0]).every(3, stride[1]).contiguous(kRows);
}

void add_strided(const Tensor& x, IntList stride, const Tensor& y) {
    Args a = raw_args(y);
    a.other_type = dtype_of(x.scalar_type());
    const int64_t height = y.size(2), width = y.size(3);
    const int64_t image = x.stride(0), line = x.stride(2) * stride[0], pixel = x.stride(3) * stride[1];
    const int64_t x_size = x.element_size(), y_size = y.element_size() * y.size(1);
    char* const to = bytes(x);
    const char* const from = bytes(y);
    parallel(0, y.size(0) * height, 1, [&](int64_t begin, int64_t end) {
        Args mine = a;
        for (int64_t i = begin * width; i < end * width; i++) {
            const int64_t n = i / width / height, h = i / width % height, w = i % width;
            mine.y = from + i * y_size;
            mine.residual = mine.out = to + (n * image + h * line + w * pixel) * x_size;
            table().convert(mine, 0, 1);
        }
    });
}

std::tuple<Tensor, Tensor, Tensor> gemm_stats(const Tensor& x, const Tensor& weight, TensorList prologue, int64_t act,
                                              double act_param, bool stats, ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const ScalarType dtype = x.scalar_type();
    const Tensor y = empty({x.size(0), K, x.size(2), x.size(3)}, x.options(), kRows);
    const GemmKernel* const kernel = gemm_kernel_of(compute);
    const ScalarType product = kernel ? ScalarType::Float : compute;
    const Right wt(weight, compute, false);
    const Operand left(x, prologue, act, act_param, compute);
    const bool direct = product == dtype;  // products are y
    Args post{};
    post.layout = rows_layout(K);
    post.y_type = dtype_of(product);
    post.other_type = dtype_of(dtype);
    Partials partials({post.layout, M}, 2, wide(x));
    const int64_t chunk = partials.chunk;
    const bool apart = kernel && partials.chunks >= kChunksApart * thread_count();
    const int64_t slice = apart ? M : std::min(M, slice_rows(kSlice, (C + K) * y.element_size(), M, chunk));
    const int64_t rows = apart ? chunk * chunks_of_piece(chunk) : slice;
    const Buffers buffers(apart, left.is_x() ? 0 : rows * C * element_size(compute),
                          direct ? 0 : rows * K * element_size(product));
    const auto piece = [&](int64_t begin, int64_t end) {
        const auto [operand, result] = buffers.get();
        char* const out = direct ? row(y, begin) : result;
        wt.product(out, left.rows(begin, end, operand), end - begin, false);
        Args mine = post;
        if (stats) {
            // the kernel counts rows from the tensor's start
            mine.y = out - begin * K * element_size(product);
            mine.out = direct ? nullptr : y.data_ptr();
            reduce(table().moments, mine, partials, begin / chunk, (end + chunk - 1) / chunk);
        } else if (!direct) {
            mine.y = out;
            mine.out = row(y, begin);
            run(table().convert, mine, {mine.layout, end - begin});
        }
    };
    for (int64_t m = 0; m < M; m += slice) in_pieces(apart, chunk, slice, m, std::min(M, m + slice), piece);
    if (!stats) return {y, Tensor(), Tensor()};
    auto [mean, var] = partials.moments(0);
    return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gemm_backward(const Tensor& dz, const Tensor& y, TensorList coef,
                                                         const Tensor& x, TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, bool need_input,
                                                         bool need_weight, const OptTensor& add, ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const ScalarType dtype = x.scalar_type();
    const bool epilogue = !prologue.empty();
    const GemmKernel* const kernel = gemm_kernel_of(compute);
    const ScalarType product = kernel ? ScalarType::Float : compute;
    std::optional<Right> w;
    if (need_input) w.emplace(weight, compute, true);
    const Operand right(x, prologue, act, act_param, compute);

    Args form{};  // dy from (dz, y)
    form.layout = rows_layout(K);
    form.y_type = dtype_of(y.scalar_type());
    form.other_type = dtype_of(compute);
    form.grad_type = dtype_of(dz.scalar_type());
    for (size_t i = 0; i < std::min<size_t>(3, coef.size()); i++) form.coef[i] = coef[i].data_ptr();
    if (coef.size() == 4) form.norm.center = coef[3].data_ptr();

    Partials partials({rows_layout(C), M}, 2, wide(x));
    const int64_t chunk = partials.chunk;
    const bool apart = kernel && partials.chunks >= kChunksApart * thread_count();
    const int64_t row_size = 2 * (C + K) * element_size(compute);
    const int64_t slice =
        std::min(M, slice_rows(std::max(kGradientSlice, kGradientRows * row_size), row_size, M, chunk));
    // slices that are taken together; dW is summed up slice by slice, so that its bits do not depend on the threads
    const int64_t together = apart ? thread_count() : 1;
    const Memory dy_slices(std::min(M, slice * together) * K * element_size(compute));
    const int64_t panels_size = need_weight && kernel ? panels_bytes(*kernel, slice, C) : 0;
    const Memory panels(panels_size * together);
    const auto panels_at = [&](int64_t index) { return panels.at<char>() + index * panels_size; };
    const Tensor dw = need_weight ? empty({K, C, 1, 1}, x.options().dtype(product)) : Tensor();

    const ScalarType dx_dtype = epilogue ? compute : dtype;
    const bool direct = product == dx_dtype;  // products are dx
    const Tensor summand = add ? add->to(dx_dtype).contiguous(kRows) : Tensor();
    const bool in_place = add && summand.storage() != dz.storage();
    const Tensor dx = !need_input ? Tensor() : in_place ? summand : empty_like(x, dx_dtype, kRows);
    // the operand is packed before the product is made, in the same place
    const int64_t rows = apart ? chunk * chunks_of_piece(chunk) : slice;
    const Buffers buffers(apart, 0,
                          std::max(right.is_x() || !need_weight ? 0 : rows * C * element_size(compute),
                                   direct || !need_input ? 0 : rows * C * element_size(product)));

    int64_t start = 0, stop = 0;  // of the slices that are taken together
    const auto piece = [&](int64_t begin, int64_t end) {
        const int64_t n = end - begin;
        char* const dy = dy_slices.at<char>() + (begin - start) * K * element_size(compute);
        Args mine = form;
        mine.y = row(y, begin);
        mine.grad = row(dz, begin);
        mine.out = dy;
        run(table().bn_backward, mine, {mine.layout, n});
        const auto [operand, result] = buffers.get();
        if (need_weight) {
            char* const a = right.rows(begin, end, operand);
            if (kernel) {
                const int64_t index = (begin - start) / slice, top = start + index * slice;
                const char* const from = a - (begin - top) * C * element_size(compute);
                pack(*kernel, {std::min(slice, stop - top), C, from, C, 1, panels_at(index)}, begin - top, end - top);
            } else {
                library_product({dw.data_ptr(), K, C, C, 1}, {dy, K, n, 1, K}, {a, n, C, C, 1}, compute, begin > 0);
            }
        }
        if (!need_input) return;
        char* const da = direct ? row(dx, begin) : result;
        const bool onto = direct && add;
        if (onto && !in_place) std::memcpy(da, row(summand, begin), n * C * element_size(dx_dtype));
        w->product(da, dy, n, onto);
        Args back = epilogue ? right.pre : raw_args(x);
        back.other_type = dtype_of(dx_dtype);
        if (epilogue) {
            back.y = x.data_ptr();
            back.grad_type = dtype_of(product);
            back.grad = da - begin * C * element_size(product);
            back.out = dx.data_ptr();
            reduce(table().bn_act_backward, back, partials, begin / chunk, (end + chunk - 1) / chunk);
        } else if (!direct) {
            back.y_type = dtype_of(product);
            back.y = da;
            back.residual = add ? row(summand, begin) : nullptr;
            back.out = row(dx, begin);
            run(table().convert, back, {back.layout, n});
        }
    };
    for (; start < M; start = stop) {
        stop = std::min(M, start + slice * together);
        in_pieces(apart, chunk, slice, start, stop, piece);
        for (int64_t i = 0, top = start; need_weight && kernel && top < stop; i++, top += slice)
            multiply(*kernel, {K, C, std::min(slice, stop - top),
                               dy_slices.at<char>() + (top - start) * K * element_size(compute), 1, K, panels_at(i),
                               static_cast<float*>(dw.data_ptr()), C, top > 0});
    }
    if (!need_input || !epilogue) return {dx, dw, Tensor(), Tensor()};
    return {dx, dw, partials.sum(0), partials.sum(1)};
}

}  // namespace fused_resnet::cpu
