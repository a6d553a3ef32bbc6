// 1x1 convolutions of channels_last tensors: matrix products taken a slice of rows at a time, so that what is applied to
// their operands and results stays in cache.
#include "args.h"
#include "conv_list.h"

namespace fused_resnet::cpu {

namespace {

// Rows per slice: about kSlice bytes of both operands, a multiple of the reductions' chunk.
constexpr int64_t kSlice = 16 << 20;
int64_t slice_rows(int64_t channels, int64_t element_size) {
    const int64_t rows = kSlice / (channels * element_size);
    return std::max<int64_t>(kChunkRows, rows / kChunkRows * kChunkRows);
}

// Some rows of a channels_last tensor as a kernel sees them.
struct Rows {
    const Tensor& t;
    int64_t first;
    char* data() const { return bytes(t, first * t.size(1)); }
};

// Rows [first, first + n) of act(s x + t), or of x in another dtype, in `scratch`; x's own rows where nothing is to be done.
Tensor operand(const Tensor& x, const Tensor& x2d, Args& pre, bool prologue, Tensor& scratch, at::ScalarType compute,
               int64_t first, int64_t n) {
    if (!prologue && x.scalar_type() == compute) return x2d.narrow(0, first, n);
    const Tensor to = scratch.narrow(0, 0, n);
    if (!prologue) return to.copy_(x2d.narrow(0, first, n));
    pre.y = Rows{x, first}.data();
    pre.out = to.data_ptr();
    pre.other_type = dtype_of(compute);
    run(table().bn_act, pre, {pre.layout, n});
    return to;
}

}  // namespace

bool is_gemm(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups) {
    return weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 && padding[0] == 0 && padding[1] == 0 &&
           format_of(x) == at::MemoryFormat::ChannelsLast;
}

Tensor strided(const Tensor& x, IntList stride) {
    if (stride[0] == 1 && stride[1] == 1) return x;
    return x.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]).contiguous(at::MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor, Tensor> gemm_stats(const Tensor& x, const Tensor& weight, at::TensorList prologue, int64_t act,
                                              double act_param, bool stats, at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const at::ScalarType dtype = x.scalar_type();
    const Tensor y = at::empty({x.size(0), K, x.size(2), x.size(3)}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    const Tensor x2d = rows_of(x), y2d = rows_of(y), wt = weight.view({K, C}).to(compute).t();
    const int64_t slice = std::min(M, slice_rows(C + K, y.element_size()));
    const auto options = x.options().dtype(compute);
    Tensor scratch = at::empty({slice, C}, options), result = dtype == compute ? Tensor() : at::empty({slice, K}, options);
    Args pre{};
    if (!prologue.empty()) pre = prologue_args(x, prologue, act, act_param);
    Args post{};
    post.layout = rows_layout(K);
    post.y_type = dtype_of(compute);
    post.other_type = dtype_of(dtype);
    Partials partials({post.layout, M}, 2, wide(x));
    for (int64_t m = 0; m < M; m += slice) {
        const int64_t n = std::min(slice, M - m);
        const Tensor a = operand(x, x2d, pre, !prologue.empty(), scratch, compute, m, n);
        Tensor out = dtype == compute ? y2d.narrow(0, m, n) : result.narrow(0, 0, n);
        at::mm_out(out, a, wt);
        if (dtype == compute && !stats) continue;
        // the kernel counts rows from the tensor's start
        post.y = static_cast<const char*>(out.data_ptr()) - m * K * out.element_size();
        post.out = dtype == compute ? nullptr : y.data_ptr();
        reduce(table().moments, post, partials, m / kChunkRows, (m + n + kChunkRows - 1) / kChunkRows);
    }
    if (!stats) return {y, Tensor(), Tensor()};
    auto [mean, var] = partials.moments(0);
    return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gemm_backward(const Tensor& dz, const Tensor& y, at::TensorList coef,
                                                         const Tensor& x, at::TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, bool need_input,
                                                         bool need_weight, const OptTensor& add, at::ScalarType compute) {
    const int64_t C = x.size(1), K = weight.size(0), M = x.numel() / C;
    const auto options = x.options().dtype(compute);
    const Tensor w = weight.view({K, C}).to(compute), x2d = rows_of(x);
    const int64_t slice = std::min(M, slice_rows(2 * (C + K), w.element_size()));
    const bool epilogue = !prologue.empty();
    Tensor scratch = at::empty({slice, C}, options), dy_scratch = at::empty({slice, K}, options);

    Args form{};  // dy from (dz, y)
    form.layout = rows_layout(K);
    form.y_type = dtype_of(y.scalar_type());
    form.other_type = dtype_of(compute);
    form.grad_type = dtype_of(dz.scalar_type());
    for (size_t i = 0; i < std::min<size_t>(3, coef.size()); i++) form.coef[i] = coef[i].data_ptr();
    if (coef.size() == 4) form.norm.center = coef[3].data_ptr();

    Args pre{};
    if (epilogue) pre = prologue_args(x, prologue, act, act_param);
    Partials partials({rows_layout(C), M}, 2, wide(x));
    Tensor dx, dx2d, da_scratch, dw;
    const at::ScalarType dx_dtype = epilogue ? compute : x.scalar_type();
    const bool accumulate = add && dx_dtype == compute && add->scalar_type() == compute && !add->is_alias_of(dz);
    if (need_input) {
        dx = accumulate ? *add : empty_like(x, dx_dtype);
        dx2d = rows_of(dx);
        if (dx_dtype != compute) da_scratch = at::empty({slice, C}, options);
    }
    if (need_weight) dw = at::empty({K, C}, options);
    const Tensor add2d = add ? rows_of(*add) : Tensor();
    for (int64_t m = 0; m < M; m += slice) {
        const int64_t n = std::min(slice, M - m);
        Tensor dy = dy_scratch.narrow(0, 0, n);
        form.y = Rows{y, m}.data();
        form.grad = Rows{dz, m}.data();
        form.out = dy.data_ptr();
        run(table().bn_backward, form, {form.layout, n});
        if (need_weight) {
            const Tensor a = operand(x, x2d, pre, epilogue, scratch, compute, m, n);
            if (m == 0) at::mm_out(dw, dy.t(), a);
            else at::addmm_out(dw, dw, dy.t(), a);
        }
        if (!need_input) continue;
        Tensor to = dx2d.narrow(0, m, n);
        Tensor da = da_scratch.defined() ? da_scratch.narrow(0, 0, n) : to;
        if (accumulate) {
            at::addmm_out(to, to, dy, w);
            continue;
        }
        at::mm_out(da, dy, w);
        if (epilogue) {
            Args back = pre;
            back.y = x.data_ptr();
            back.other_type = dtype_of(compute);
            back.grad = back.out = dx.data_ptr();
            reduce(table().bn_act_backward, back, partials, m / kChunkRows, (m + n + kChunkRows - 1) / kChunkRows);
        } else if (add) {
            at::add_out(to, da, add2d.narrow(0, m, n));
        } else if (da_scratch.defined()) {
            to.copy_(da);
        }
    }
    if (need_weight) dw = dw.view(weight.sizes());
    if (!need_input || !epilogue) return {dx, dw, Tensor(), Tensor()};
    return {dx, dw, partials.sum(0), partials.sum(1)};
}

}  // namespace fused_resnet::cpu
