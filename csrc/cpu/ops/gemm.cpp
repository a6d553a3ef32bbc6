// 1x1 convolutions of channels_last tensors: matrix products of some rows at a time, so that what is applied to their
// operands and results stays in cache. With products of our own every thread takes chunks of rows from the prologue to
// the epilogue; with ATen's, or of few rows, all threads take each step together.
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

// The right operand of products, in a dtype that they are computed in: packed for our kernel, or ATen's.
class Right {
    Tensor matrix, packed;
    const GemmKernel* kernel = nullptr;

  public:
    Right() = default;
    explicit Right(const Tensor& b) : matrix(b), kernel(gemm_kernel_of(b.scalar_type())) {
        if (kernel) packed = pack(*kernel, b);
    }
    // out (+)= a b, rows of adjacent values; out is float with our kernel. A piece that one thread takes for itself may
    // call it then.
    void product(void* out, void* a, int64_t rows, bool accumulate) const {
        const int64_t depth = matrix.size(0), columns = matrix.size(1);
        if (kernel)
            return multiply(*kernel, {rows, columns, depth, a, depth, 1, packed.const_data_ptr(),
                                      static_cast<float*>(out), columns, accumulate});
        const Tensor left = at::from_blob(a, {rows, depth}, matrix.options());
        Tensor to = at::from_blob(out, {rows, columns}, matrix.options());
        if (accumulate) at::addmm_out(to, to, left, matrix);
        else at::mm_out(to, left, matrix);
    }
};

// What a product's left operand is made of: x itself, x in another dtype, or act(s x + t).
struct Operand {
    const Tensor& x;
    Args pre{};
    bool prologue;
    at::ScalarType compute;

    Operand(const Tensor& x, at::TensorList norm, int64_t act, double act_param, at::ScalarType compute)
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
    Tensor shared;

  public:
    Buffers(bool apart, int64_t operand_bytes, int64_t product_bytes)
        : operand((operand_bytes + 63) / 64 * 64), size(operand + product_bytes) {
        if (!apart) shared = at::empty({size}, at::TensorOptions().dtype(at::kByte));
    }
    std::pair<char*, char*> get() const {
        char* const start = shared.defined() ? bytes(shared) : reinterpret_cast<char*>(scratch((size + 3) / 4));
        return {start, start + operand};
    }
};

}  // namespace

bool is_gemm(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups) {
    return weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 && padding[0] == 0 && padding[1] == 0 &&
           format_of(x) == at::MemoryFormat::ChannelsLast;
}

Tensor strided(const Tensor& x, IntList stride) {
    if (stride[0] == 1 && stride[1] == 1) return x;
    return x.slice(2, 0, std::nullopt, stride[0])
        .slice(3, 0, std::nullopt, stride[1])
        .contiguous(at::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor, Tensor> gemm_stats(const Tensor& x, const Tensor& weight, at::TensorList prologue,
                                              int64_t act, double act_param, bool stats, at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const at::ScalarType dtype = x.scalar_type();
    const Tensor y =
        at::empty({x.size(0), K, x.size(2), x.size(3)}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const GemmKernel* const kernel = gemm_kernel_of(compute);
    const at::ScalarType product = kernel ? at::kFloat : compute;
    const Right wt(weight.view({K, C}).to(compute).t());
    const Operand left(x, prologue, act, act_param, compute);
    const bool direct = product == dtype;  // products are y
    Args post{};
    post.layout = rows_layout(K);
    post.y_type = dtype_of(product);
    post.other_type = dtype_of(dtype);
    Partials partials({post.layout, M}, 2, wide(x));
    const int64_t chunk = partials.chunk;
    const bool apart = kernel && partials.chunks() >= kChunksApart * at::get_num_threads();
    const int64_t slice = apart ? M : std::min(M, slice_rows(kSlice, (C + K) * y.element_size(), M, chunk));
    const int64_t rows = apart ? chunk * chunks_of_piece(chunk) : slice;
    const Buffers buffers(apart, left.is_x() ? 0 : rows * C * at::elementSize(compute),
                          direct ? 0 : rows * K * at::elementSize(product));
    const auto piece = [&](int64_t begin, int64_t end) {
        const auto [operand, result] = buffers.get();
        char* const out = direct ? row(y, begin) : result;
        wt.product(out, left.rows(begin, end, operand), end - begin, false);
        Args mine = post;
        if (stats) {
            // the kernel counts rows from the tensor's start
            mine.y = out - begin * K * at::elementSize(product);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> gemm_backward(const Tensor& dz, const Tensor& y, at::TensorList coef,
                                                         const Tensor& x, at::TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, bool need_input,
                                                         bool need_weight, const OptTensor& add,
                                                         at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const at::ScalarType dtype = x.scalar_type();
    const bool epilogue = !prologue.empty();
    const GemmKernel* const kernel = gemm_kernel_of(compute);
    const at::ScalarType product = kernel ? at::kFloat : compute;
    const auto options = x.options().dtype(compute);
    const Right w = need_input ? Right(weight.view({K, C}).to(compute)) : Right();
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
    const bool apart = kernel && partials.chunks() >= kChunksApart * at::get_num_threads();
    const int64_t row_size = 2 * (C + K) * at::elementSize(compute);
    const int64_t slice =
        std::min(M, slice_rows(std::max(kGradientSlice, kGradientRows * row_size), row_size, M, chunk));
    // slices that are taken together; dW is summed up slice by slice, so that its bits do not depend on the threads
    const int64_t together = apart ? at::get_num_threads() : 1;
    const Tensor dy_slices = at::empty({std::min(M, slice * together), K}, options);
    const Tensor panels =
        need_weight && kernel
            ? empty_panels(*kernel, slice, panels_of(*kernel, C) * kernel->columns * together, options)
            : Tensor();
    const int64_t panels_size = panels.defined() ? panels.numel() / together : 0;
    const Tensor dw = need_weight ? at::empty({K, C}, options.dtype(product)) : Tensor();

    const at::ScalarType dx_dtype = epilogue ? compute : dtype;
    const bool direct = product == dx_dtype;  // products are dx
    const Tensor summand = add ? add->to(dx_dtype).contiguous(at::MemoryFormat::ChannelsLast) : Tensor();
    const bool in_place = add && !summand.is_alias_of(dz);
    const Tensor dx = !need_input ? Tensor() : in_place ? summand : empty_like(x, dx_dtype);
    // the operand is packed before the product is made, in the same place
    const int64_t rows = apart ? chunk * chunks_of_piece(chunk) : slice;
    const Buffers buffers(apart, 0,
                          std::max(right.is_x() || !need_weight ? 0 : rows * C * at::elementSize(compute),
                                   direct || !need_input ? 0 : rows * C * at::elementSize(product)));

    int64_t start = 0, stop = 0;  // of the slices that are taken together
    const auto piece = [&](int64_t begin, int64_t end) {
        const int64_t n = end - begin;
        char* const dy = bytes(dy_slices, (begin - start) * K);
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
                const char* const from = a - (begin - top) * C * at::elementSize(compute);
                pack(*kernel, {std::min(slice, stop - top), C, from, C, 1, bytes(panels, index * panels_size)},
                     begin - top, end - top);
            } else {
                Tensor to = dw;
                const Tensor left = at::from_blob(dy, {n, K}, options).t(), matrix = at::from_blob(a, {n, C}, options);
                if (begin == 0) at::mm_out(to, left, matrix);
                else at::addmm_out(to, to, left, matrix);
            }
        }
        if (!need_input) return;
        char* const da = direct ? row(dx, begin) : result;
        const bool onto = direct && add;
        if (onto && !in_place) std::memcpy(da, row(summand, begin), n * C * at::elementSize(dx_dtype));
        w.product(da, dy, n, onto);
        Args back = epilogue ? right.pre : raw_args(x);
        back.other_type = dtype_of(dx_dtype);
        if (epilogue) {
            back.y = x.data_ptr();
            back.grad_type = dtype_of(product);
            back.grad = da - begin * C * at::elementSize(product);
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
            multiply(*kernel, {K, C, std::min(slice, stop - top), bytes(dy_slices, (top - start) * K), 1, K,
                               bytes(panels, i * panels_size), dw.mutable_data_ptr<float>(), C, top > 0});
    }
    const Tensor dweight = need_weight ? dw.view(weight.sizes()) : dw;
    if (!need_input || !epilogue) return {dx, dweight, Tensor(), Tensor()};
    return {dx, dweight, partials.sum(0), partials.sum(1)};
}

}  // namespace fused_resnet::cpu
