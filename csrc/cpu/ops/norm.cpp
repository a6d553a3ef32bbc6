#include "ops.h"

namespace fused_resnet::cpu {

namespace {

Args args_of(const Tensor& y, at::TensorList norm, int64_t act, double act_param, const OptTensor& residual,
             at::TensorList residual_norm) {
    Args a{};
    a.layout = View::of(y).layout;
    a.y_type = a.other_type = a.grad_type = dtype_of(y.scalar_type());
    a.act = act_of(act);
    a.act_param = act_param;
    a.y = y.data_ptr();
    set_norm(a.norm, norm, y);
    if (residual) {
        TORCH_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type() &&
                        residual->is_contiguous(format_of(y)),
                    "residual: expected y's shape, dtype and layout");
        a.residual = residual->data_ptr();
        if (!residual_norm.empty()) set_norm(a.residual_norm, residual_norm, y);
    }
    return a;
}

void check_like(const char* name, const Tensor& t, const Tensor& y) {
    TORCH_CHECK(t.sizes() == y.sizes() && t.is_contiguous(format_of(y)), name, ": expected y's shape and layout, got ",
                t.sizes(), " for ", y.sizes());
}

Pool pool_of(const Tensor& y, const Tensor& out, const Tensor& argmax, IntList kernel, IntList stride,
             IntList padding) {
    return {y.size(2),
            y.size(3),
            out.size(2),
            out.size(3),
            {kernel[0], kernel[1]},
            {stride[0], stride[1]},
            {padding[0], padding[1]},
            static_cast<uint8_t*>(argmax.data_ptr())};
}

// body(T{}) for vectors in `dtype`: float or double.
template <class Body>
void with_wide(at::ScalarType dtype, Body body) {
    if (dtype == at::kDouble) body(double{});
    else body(float{});
}

const void* vector(const char* name, const Tensor& v, int64_t channels, at::ScalarType dtype) {
    TORCH_CHECK(v.dim() == 1 && v.size(0) == channels && v.is_contiguous() && v.scalar_type() == dtype, name,
                ": expected ", channels, " values in ", dtype, ", got ", v.sizes(), " in ", v.scalar_type());
    return v.const_data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y) {
    const View view = View::of(y);
    Partials partials(view, 2, wide(y));
    Args a{};
    a.layout = view.layout;
    a.y_type = a.other_type = dtype_of(y.scalar_type());
    a.y = y.data_ptr();
    reduce(table().moments, a, partials, 0, partials.chunks());
    return partials.moments(view.layout.plane);
}

Tensor bn_act(const Tensor& y, at::TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              at::TensorList residual_norm, at::ScalarType out_dtype) {
    Args a = args_of(y, norm, act, act_param, residual, residual_norm);
    const Tensor out = empty_like(y, out_dtype);
    a.other_type = dtype_of(out_dtype);
    a.out = out.data_ptr();
    run(table().bn_act, a, View::of(y));
    return out;
}

void bn_act_in_place(const Tensor& y, at::TensorList norm, int64_t act, double act_param, const OptTensor& residual) {
    Args a = args_of(y, norm, act, act_param, residual, {});
    a.out = y.data_ptr();
    run(table().bn_act, a, View::of(y));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y, at::TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           at::TensorList residual_norm) {
    check_like("dout", dout, y);
    Args a = args_of(y, norm, act, act_param, residual, residual_norm);
    const bool third = residual && !residual_norm.empty();
    const Tensor dz = empty_like(y, dout.scalar_type());
    a.other_type = a.grad_type = dtype_of(dout.scalar_type());
    a.grad = dout.data_ptr();
    a.out = dz.data_ptr();
    Partials partials(View::of(y), third ? 3 : 2, wide(y));
    reduce(table().bn_act_backward, a, partials, 0, partials.chunks());
    return {dz, partials.sum(0), partials.sum(1),
            third ? partials.sum(2) : Tensor(at::empty({0}, partials.data.options()))};
}

Tensor bn_backward(const Tensor& dz, const Tensor& y, at::TensorList coef, at::ScalarType out_dtype) {
    check_like("dz", dz, y);
    TORCH_CHECK(dz.scalar_type() == y.scalar_type() || dz.scalar_type() == wide(y), "dz: expected y's dtype or ",
                wide(y), ", got ", dz.scalar_type());
    TORCH_CHECK(coef.size() == 1 || coef.size() == 4, "coef: expected [a] or [a, b, c, center]");
    Args a{};
    a.layout = View::of(y).layout;
    a.y_type = dtype_of(y.scalar_type());
    a.other_type = dtype_of(out_dtype);
    a.grad_type = dtype_of(dz.scalar_type());
    a.y = y.data_ptr();
    a.grad = dz.data_ptr();
    const Tensor dy = empty_like(y, out_dtype);
    a.out = dy.data_ptr();
    for (size_t i = 0; i < std::min<size_t>(3, coef.size()); i++) a.coef[i] = coef[i].data_ptr();
    if (coef.size() == 4) a.norm.center = coef[3].data_ptr();
    run(table().bn_backward, a, View::of(y));
    return dy;
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& y, at::TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding) {
    Args a = args_of(y, norm, act, act_param, std::nullopt, {});
    const int64_t oh = (y.size(2) + 2 * padding[0] - kernel[0]) / stride[0] + 1;
    const int64_t ow = (y.size(3) + 2 * padding[1] - kernel[1]) / stride[1] + 1;
    const auto options = y.options().memory_format(format_of(y));
    const Tensor out = at::empty({y.size(0), y.size(1), oh, ow}, options);
    const Tensor argmax = at::empty(out.sizes(), options.dtype(at::kByte));
    a.out = out.data_ptr();
    const Pool pool = pool_of(y, out, argmax, kernel, stride, padding);
    const int64_t images = y.size(0) * (a.layout.plane ? y.size(1) : 1);
    parallel(0, images * oh, 1, [&](int64_t b, int64_t e) { table().bn_act_max_pool(a, pool, b, e); });
    return {out, argmax};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax, const Tensor& y,
                                                            at::TensorList norm, int64_t act, double act_param,
                                                            IntList kernel, IntList stride, IntList padding,
                                                            at::ScalarType out_dtype) {
    TORCH_CHECK(dout.scalar_type() == y.scalar_type() && dout.is_contiguous(format_of(y)),
                "dout: expected y's dtype and layout");
    TORCH_CHECK(argmax.sizes() == dout.sizes() && argmax.is_contiguous(format_of(y)),
                "argmax: expected dout's shape and layout");
    Args a = args_of(y, norm, act, act_param, std::nullopt, {});
    const Tensor dz = empty_like(y, out_dtype);
    a.other_type = dtype_of(out_dtype);
    a.grad = dout.data_ptr();
    a.out = dz.data_ptr();
    const Pool pool = pool_of(y, dout, argmax, kernel, stride, padding);
    const int64_t rows = y.size(0) * (a.layout.plane ? y.size(1) : 1) * y.size(2), chunk = 16;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const Tensor partial = at::empty({2, chunks, y.size(1)}, at::TensorOptions().dtype(wide(y)));
    parallel(0, chunks, 1, [&](int64_t i0, int64_t i1) {
        Args mine = a;
        for (int64_t i = i0; i < i1; i++) {
            for (int k = 0; k < 2; k++) mine.sums[k] = bytes(partial, (k * chunks + i) * y.size(1));
            table().bn_act_max_pool_backward(mine, pool, i * chunk, std::min(rows, (i + 1) * chunk));
        }
    });
    return {dz, partial[0].sum(0), partial[1].sum(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps) {
    const at::ScalarType dtype = wide(mean);
    const int64_t C = mean.numel();
    // a convolution's bias and a checkpoint's weights may have any dtype
    const auto given = [&](const OptTensor& t) { return t ? t->to(dtype).contiguous() : Tensor(); };
    const Tensor in[5] = {given(mean), given(var), given(weight), given(bias), given(conv_bias)};
    const char* names[5] = {"mean", "var", "weight", "bias", "conv_bias"};
    Tensor out[4];
    for (Tensor& t : out) t = at::empty({C}, in[0].options());
    with_wide(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* from[5] = {};
        T* to[4];
        for (int i = 0; i < 5; i++)
            if (in[i].defined()) from[i] = static_cast<const T*>(vector(names[i], in[i], C, dtype));
        for (int i = 0; i < 4; i++) to[i] = out[i].mutable_data_ptr<T>();
        const auto at = [&](int i, int64_t c, T other) { return from[i] ? from[i][c] : other; };
        for (int64_t c = 0; c < C; c++) {
            // In double: an error here affects every pixel of a channel, and no mean over pixels reduces it. The shift
            // is computed with the rounded scale, so that y = center still gives the bias.
            const Fold<double> f =
                fused_resnet::bn_fold<double>(from[0][c], from[1][c], at(2, c, 1), 0, at(4, c, 0), eps);
            to[0][c] = T(f.scale), to[2][c] = T(f.center), to[3][c] = T(f.rstd);
            to[1][c] = T(affine<double>(-f.center, to[0][c], at(3, c, 0)));
        }
    });
    return {out[0], out[1], out[2], out[3]};
}

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count) {
    const at::ScalarType dtype = wide(scale);
    const int64_t C = scale.numel();
    Tensor out[3];
    for (int i = 0; i < (count ? 3 : 1); i++) out[i] = at::empty({C}, scale.options());
    with_wide(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto at = [&](const char* name, const Tensor& v) {
            return static_cast<const T*>(vector(name, v, C, dtype));
        };
        const T *s = at("scale", scale), *r = at("rstd", rstd), *dz = at("sum_dz", sum_dz),
                *dz_y = at("sum_dz_y", sum_dz_y);
        T* to[3] = {};
        for (int i = 0; i < 3; i++)
            if (out[i].defined()) to[i] = out[i].mutable_data_ptr<T>();
        for (int64_t c = 0; c < C; c++) {
            const Coefficients<T> k = fused_resnet::bn_coefficients(s[c], r[c], dz[c], dz_y[c], T(count.value_or(1)));
            to[0][c] = k.dgamma;
            if (count) to[1][c] = k.b, to[2][c] = k.c;
        }
    });
    return {out[0], out[1], out[2]};
}

}  // namespace fused_resnet::cpu
