#include "arena.h"
#include "ops.h"

namespace fused_resnet::cpu {

namespace {

Args args_of(const View& view, const Tensor& y, TensorList norm, int64_t act, double act_param,
             const OptTensor& residual, TensorList residual_norm) {
    Args a{};
    a.layout = view.layout;
    a.y_type = a.other_type = a.grad_type = dtype_of(y.scalar_type());
    a.act = act_of(act);
    a.act_param = act_param;
    a.y = y.data_ptr();
    set_norm(a.norm, norm, y);
    if (residual) {
        FR_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type() &&
                     residual->is_contiguous(view.format()),
                 "residual: expected y's shape, dtype and layout");
        a.residual = residual->data_ptr();
        if (!residual_norm.empty()) set_norm(a.residual_norm, residual_norm, y);
    }
    return a;
}

void check_like(const char* name, const Tensor& t, const View& view, const Tensor& y) {
    FR_CHECK(t.sizes() == y.sizes() && t.is_contiguous(view.format()), name, ": expected y's shape and layout, got ",
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
void with_wide(ScalarType dtype, Body body) {
    if (dtype == ScalarType::Double) body(double{});
    else body(float{});
}

const void* vector(const char* name, const Tensor& v, int64_t channels, ScalarType dtype) {
    FR_CHECK(v.dim() == 1 && v.size(0) == channels && v.is_contiguous() && v.scalar_type() == dtype, name,
             ": expected ", channels, " values in ", dtype, ", got ", v.sizes(), " in ", v.scalar_type());
    return v.data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y) {
    const View view = View::of(y);
    Partials partials(view, 2, wide(y));
    Args a{};
    a.layout = view.layout;
    a.y_type = a.other_type = dtype_of(y.scalar_type());
    a.y = y.data_ptr();
    reduce(table().moments, a, partials, 0, partials.chunks);
    return partials.moments(view.layout.plane);
}

Tensor bn_act(const Tensor& y, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              TensorList residual_norm, ScalarType out_dtype) {
    const View view = View::of(y);
    Args a = args_of(view, y, norm, act, act_param, residual, residual_norm);
    const Tensor out = view.format() == kRows ? result(y.sizes(), y.options().dtype(out_dtype))
                                              : empty_like(y, out_dtype, view.format());
    a.other_type = dtype_of(out_dtype);
    a.out = out.data_ptr();
    run(table().bn_act, a, view);
    return out;
}

void bn_act_in_place(const Tensor& y, TensorList norm, int64_t act, double act_param, const OptTensor& residual) {
    const View view = View::of(y);
    Args a = args_of(view, y, norm, act, act_param, residual, {});
    a.out = y.data_ptr();
    run(table().bn_act, a, view);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y, TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           TensorList residual_norm) {
    const View view = View::of(y);
    check_like("dout", dout, view, y);
    Args a = args_of(view, y, norm, act, act_param, residual, residual_norm);
    const bool third = residual && !residual_norm.empty();
    const Tensor dz = empty_like(y, dout.scalar_type(), view.format());
    a.other_type = a.grad_type = dtype_of(dout.scalar_type());
    a.grad = dout.data_ptr();
    a.out = dz.data_ptr();
    Partials partials(view, third ? 3 : 2, wide(y));
    reduce(table().bn_act_backward, a, partials, 0, partials.chunks);
    return {dz, partials.sum(0), partials.sum(1), third ? partials.sum(2) : empty({0}, {wide(y)})};
}

Tensor bn_backward(const Tensor& dz, const Tensor& y, TensorList coef, ScalarType out_dtype) {
    const View view = View::of(y);
    check_like("dz", dz, view, y);
    FR_CHECK(dz.scalar_type() == y.scalar_type() || dz.scalar_type() == wide(y), "dz: expected y's dtype or ", wide(y),
             ", got ", dz.scalar_type());
    FR_CHECK(coef.size() == 1 || coef.size() == 4, "coef: expected [a] or [a, b, c, center]");
    Args a{};
    a.layout = view.layout;
    a.y_type = dtype_of(y.scalar_type());
    a.other_type = dtype_of(out_dtype);
    a.grad_type = dtype_of(dz.scalar_type());
    a.y = y.data_ptr();
    a.grad = dz.data_ptr();
    const Tensor dy = empty_like(y, out_dtype, view.format());
    a.out = dy.data_ptr();
    for (size_t i = 0; i < std::min<size_t>(3, coef.size()); i++) a.coef[i] = coef[i].data_ptr();
    if (coef.size() == 4) a.norm.center = coef[3].data_ptr();
    run(table().bn_backward, a, view);
    return dy;
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& y, TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding) {
    const View view = View::of(y);
    Args a = args_of(view, y, norm, act, act_param, std::nullopt, {});
    const int64_t oh = output_size(y.size(2), kernel[0], stride[0], padding[0]);
    const int64_t ow = output_size(y.size(3), kernel[1], stride[1], padding[1]);
    const Tensor out = empty({y.size(0), y.size(1), oh, ow}, y.options(), view.format());
    const Tensor argmax = empty_like(out, ScalarType::Byte, view.format());
    a.out = out.data_ptr();
    const Pool pool = pool_of(y, out, argmax, kernel, stride, padding);
    const int64_t images = y.size(0) * (a.layout.plane ? y.size(1) : 1);
    parallel(0, images * oh, 1, [&](int64_t b, int64_t e) { table().bn_act_max_pool(a, pool, b, e); });
    return {out, argmax};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax, const Tensor& y,
                                                            TensorList norm, int64_t act, double act_param,
                                                            IntList kernel, IntList stride, IntList padding,
                                                            ScalarType out_dtype) {
    const View view = View::of(y);
    FR_CHECK(dout.scalar_type() == y.scalar_type() && dout.is_contiguous(view.format()),
             "dout: expected y's dtype and layout");
    FR_CHECK(argmax.sizes() == dout.sizes() && argmax.is_contiguous(view.format()),
             "argmax: expected dout's shape and layout");
    Args a = args_of(view, y, norm, act, act_param, std::nullopt, {});
    const Tensor dz = empty_like(y, out_dtype, view.format());
    a.other_type = dtype_of(out_dtype);
    a.grad = dout.data_ptr();
    a.out = dz.data_ptr();
    const Pool pool = pool_of(y, dout, argmax, kernel, stride, padding);
    const int64_t rows = y.size(0) * (a.layout.plane ? y.size(1) : 1) * y.size(2), chunk = 16;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const Sums sums(2, chunks, y.size(1), wide(y));
    parallel(0, chunks, 1, [&](int64_t i0, int64_t i1) {
        Args mine = a;
        for (int64_t i = i0; i < i1; i++) {
            sums.aim(mine, i);
            table().bn_act_max_pool_backward(mine, pool, i * chunk, std::min(rows, (i + 1) * chunk));
        }
    });
    return {dz, sums.sum(0), sums.sum(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps) {
    const ScalarType dtype = wide(mean);
    const int64_t C = mean.numel();
    const auto given = [](const OptTensor& t) { return t ? &*t : nullptr; };
    const Tensor* in[5] = {&mean, &var, given(weight), given(bias), given(conv_bias)};
    const char* names[5] = {"mean", "var", "weight", "bias", "conv_bias"};
    Tensor converted[5];  // a convolution's bias and a checkpoint's weights may have any dtype
    for (int i = 0; i < 5; i++)
        if (in[i] && !(in[i]->scalar_type() == dtype && in[i]->is_contiguous()))
            converted[i] = in[i]->to(dtype).contiguous(), in[i] = &converted[i];
    Tensor out[4];
    for (Tensor& t : out) t = empty({C}, {dtype});
    with_wide(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* from[5] = {};
        T* to[4];
        for (int i = 0; i < 5; i++)
            if (in[i]) from[i] = static_cast<const T*>(vector(names[i], *in[i], C, dtype));
        for (int i = 0; i < 4; i++) to[i] = static_cast<T*>(out[i].data_ptr());
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
    return {std::move(out[0]), std::move(out[1]), std::move(out[2]), std::move(out[3])};
}

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count) {
    const ScalarType dtype = wide(scale);
    const int64_t C = scale.numel();
    Tensor out[3];
    for (int i = 0; i < (count ? 3 : 1); i++) out[i] = empty({C}, scale.options());
    with_wide(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto at = [&](const char* name, const Tensor& v) {
            return static_cast<const T*>(vector(name, v, C, dtype));
        };
        const T *s = at("scale", scale), *r = at("rstd", rstd), *dz = at("sum_dz", sum_dz),
                *dz_y = at("sum_dz_y", sum_dz_y);
        T* to[3] = {};
        for (int i = 0; i < 3; i++)
            if (out[i].defined()) to[i] = static_cast<T*>(out[i].data_ptr());
        for (int64_t c = 0; c < C; c++) {
            const Coefficients<T> k = fused_resnet::bn_coefficients(s[c], r[c], dz[c], dz_y[c], T(count.value_or(1)));
            to[0][c] = k.dgamma;
            if (count) to[1][c] = k.b, to[2][c] = k.c;
        }
    });
    return {std::move(out[0]), std::move(out[1]), std::move(out[2])};
}

}  // namespace fused_resnet::cpu
