#include "ops.h"

#include <limits>

#include "tensors.h"

namespace fused_resnet::cuda::ops {

namespace {

void check(Status status, const char* name) { FR_CHECK(status == nullptr, "fused_resnet_cuda::", name, ": ", status); }

}  // namespace

Tensor empty_nhwc(IntList nchw, const Options& options) { return empty(nchw, options, MemoryFormat::ChannelsLast); }

Tensor nhwc(const char* name, const Tensor& t) {
    FR_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", t.sizes());
    if (t.is_channels_last()) return t;
    if (!t.is_contiguous()) return t.contiguous(MemoryFormat::ChannelsLast);
    const Tensor to = empty_nhwc(t.sizes(), t.options());
    check(cuda::transpose(int(t.element_size()), t.size(0), t.size(1), t.size(2) * t.size(3), t.data_ptr(),
                          to.data_ptr(), current_stream(t)),
          name);
    return to;
}

Tensor like(const char* name, const Tensor& t, const Tensor& y, const char* what) {
    FR_CHECK(t.sizes() == y.sizes() && t.options() == y.options(), name, ": expected ", what,
             "'s shape, dtype and device, ", y.sizes(), " in ", y.options(), ", got ", t.sizes(), " in ", t.options());
    return nhwc(name, t);
}

namespace {

// An uninitialised NHWC tensor like `like`, with another height and width.
Tensor empty_nhwc(const Tensor& like, int64_t height, int64_t width, ScalarType dtype) {
    return ops::empty_nhwc({like.size(0), like.size(1), height, width}, like.options().dtype(dtype));
}

// A vector of so many values, with options `like`.
const void* vector(const char* name, const Tensor& v, int64_t channels, const Options& like) {
    FR_CHECK(v.dim() == 1 && v.size(0) == channels && v.options() == like && v.is_contiguous(), name,
             ": expected contiguous vectors of ", channels, " values in ", like, ", got ", v.sizes(), " in ",
             v.options());
    return v.data_ptr();
}

// Those of statistics and per-channel vectors.
Options wide_options(const Tensor& y) { return y.options().dtype(wide(y)); }

// [scale, shift] or [scale, shift, center].
Affine affine_of(const char* name, TensorList norm, const Tensor& y, bool center) {
    FR_CHECK(norm.size() == (center ? 3 : 2), name, ": expected [scale, shift", center ? ", center" : "", "], got ",
             norm.size(), " tensors");
    const auto at = [&](size_t i) { return vector(name, norm[i], y.size(1), wide_options(y)); };
    return {at(0), at(1), center ? at(2) : nullptr};
}

// y and what follows from it.
Pass pass_of(const Tensor& y) {
    Pass a{};
    a.dtype = dtype_of(y.scalar_type(), "y: ");
    a.rows = y.size(0) * y.size(2) * y.size(3);
    a.channels = y.size(1);
    a.y = y.data_ptr();
    return a;
}

Pool pool_of(const Tensor& y, int64_t out_height, int64_t out_width, uint8_t* argmax, IntList kernel, IntList stride,
             IntList padding) {
    FR_CHECK(y.size(0) * (y.size(2) + 2 * padding[0] + 1) < std::numeric_limits<int>::max() &&
                 y.size(3) + 2 * padding[1] < std::numeric_limits<int>::max(),
             "y: expected fewer than 2^31 rows of images, got ", y.sizes());
    FR_CHECK(kernel[0] * kernel[1] <= 256, "kernel: expected a window of at most 256 places, got ", kernel);
    Pool q{int(y.size(0)), int(y.size(2)), int(y.size(3)), int(out_height), int(out_width), {}, {}, {}, argmax};
    for (int i = 0; i < 2; i++)
        q.kernel[i] = int(kernel[i]), q.stride[i] = int(stride[i]), q.padding[i] = int(padding[i]);
    return q;
}

// Uninitialised vectors of `channels`, the first `count` of them. An operator's results must not share memory.
template <size_t N>
struct Vectors {
    Tensor tensors[N];
    void* pointers[N] = {};

    Vectors(int64_t channels, const Options& options, size_t count = N) {
        for (size_t i = 0; i < N; i++) {
            tensors[i] = empty({i < count ? channels : 0}, options);
            if (i < count) pointers[i] = tensors[i].data_ptr();
        }
    }
    const Tensor& operator[](size_t i) const { return tensors[i]; }
};

// A reduction's partial results, `kinds` of them.
Tensor partials_of(Pass& a, int kinds, int64_t rows, const Tensor& y) {
    const Tensor partials = empty({kinds, rows, a.channels}, wide_options(y));
    char* const first = static_cast<char*>(partials.data_ptr());
    for (int k = 0; k < kinds; k++) a.partials[k] = first + k * rows * a.channels * partials.element_size();
    return partials;
}

// The partial results' sums. The third is empty if there are two kinds.
Vectors<3> merged(const Pass& a, const Tensor& partials, Stream stream, const char* name) {
    const int kinds = int(partials.size(0));
    Vectors<3> to(a.channels, partials.options(), kinds);
    check(cuda::merge_sums(a.dtype, a.channels, partials.size(1), kinds, a.partials, to.pointers, stream), name);
    return to;
}

}  // namespace

std::tuple<Tensor, Tensor> bn_stats(const Tensor& given) {
    const OnDevice guard(given);
    const Tensor y = nhwc("y", given);
    const Stream stream = current_stream(y);
    Pass a = pass_of(y);
    const Split split = bn_stats_split(a);
    const Tensor partials = partials_of(a, 2, split.partials, y);
    check(cuda::bn_stats(a, stream), "bn_stats");
    const Vectors<2> to(a.channels, partials.options());
    check(cuda::merge_moments(a.dtype, a.channels, a.rows, split, a.partials[0], a.partials[1], to.pointers[0],
                              to.pointers[1], stream),
          "bn_stats");
    return {to[0], to[1]};
}

Tensor bn_act(const Tensor& given, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              TensorList residual_norm) {
    const OnDevice guard(given);
    const Tensor y = nhwc("y", given), r = residual ? like("residual", *residual, y) : Tensor();
    const Tensor out = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, false);
    if (r.defined()) a.residual = r.data_ptr();
    if (!residual_norm.empty()) a.residual_norm = affine_of("residual_norm", residual_norm, y, false);
    a.out = out.data_ptr();
    check(cuda::bn_act(a, current_stream(y)), "bn_act");
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& given, TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           TensorList residual_norm) {
    const OnDevice guard(given);
    const Tensor y = nhwc("y", given), r = residual ? like("residual", *residual, y) : Tensor(),
                 g = like("dout", dout, y);
    const Tensor dz = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    const Stream stream = current_stream(y);
    const bool third = r.defined() && !residual_norm.empty();
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, true);
    if (r.defined()) a.residual = r.data_ptr();
    if (third) a.residual_norm = affine_of("residual_norm", residual_norm, y, true);
    a.grad = g.data_ptr();
    a.out = dz.data_ptr();
    const Tensor partials = partials_of(a, third ? 3 : 2, bn_act_backward_split(a).partials, y);
    check(cuda::bn_act_backward(a, stream), "bn_act_backward");
    const Vectors<3> to = merged(a, partials, stream, "bn_act_backward");
    return {dz, to[0], to[1], to[2]};
}

Tensor bn_backward(const Tensor& dz, const Tensor& given, TensorList coef) {
    const OnDevice guard(given);
    FR_CHECK(coef.size() == 1 || coef.size() == 4, "coef: expected [a] or [a, b, c, center], got ", coef.size(),
             " tensors");
    const Tensor y = nhwc("y", given), g = like("dz", dz, y);
    const Tensor dy = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    Pass a = pass_of(y);
    for (size_t i = 0; i < coef.size(); i++) {
        const void* v = vector("coef", coef[i], a.channels, wide_options(y));
        if (i < 3) a.coef[i] = v;
        else a.norm.center = v;
    }
    a.grad = g.data_ptr();
    a.out = dy.data_ptr();
    check(cuda::bn_backward(a, current_stream(y)), "bn_backward");
    return dy;
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& given, TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding) {
    const OnDevice guard(given);
    const Tensor y = nhwc("y", given);
    int64_t size[2];
    for (int i = 0; i < 2; i++) {
        FR_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel[i] &&
                     y.size(2 + i) + 2 * padding[i] >= kernel[i],
                 "kernel: expected a window inside the padded image, got kernel ", kernel, ", stride ", stride,
                 ", padding ", padding, " for ", y.sizes());
        size[i] = output_size(y.size(2 + i), kernel[i], stride[i], padding[i]);
    }
    const Tensor out = empty_nhwc(y, size[0], size[1], y.scalar_type()),
                 argmax = empty_nhwc(y, size[0], size[1], ScalarType::Byte);
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, false);
    a.out = out.data_ptr();
    const Pool q = pool_of(y, size[0], size[1], static_cast<uint8_t*>(argmax.data_ptr()), kernel, stride, padding);
    check(cuda::bn_act_max_pool(a, q, current_stream(y)), "bn_act_max_pool");
    return {out, argmax};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax,
                                                            const Tensor& given, TensorList norm, int64_t act,
                                                            double act_param, IntList kernel, IntList stride,
                                                            IntList padding) {
    const OnDevice guard(given);
    FR_CHECK(dout.scalar_type() == given.scalar_type(), "dout: expected y's dtype ", given.scalar_type(), ", got ",
             dout.scalar_type());
    FR_CHECK(argmax.scalar_type() == ScalarType::Byte && argmax.sizes() == dout.sizes(),
             "argmax: expected uint8 of dout's shape ", dout.sizes(), ", got ", argmax.sizes(), " in ",
             argmax.scalar_type());
    const Tensor y = nhwc("y", given), g = nhwc("dout", dout), places = nhwc("argmax", argmax);
    const Tensor dz = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    const Stream stream = current_stream(y);
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, true);
    a.grad = g.data_ptr();
    a.out = dz.data_ptr();
    // only read, by this direction
    auto* const at_maximum = const_cast<uint8_t*>(static_cast<const uint8_t*>(places.data_ptr()));
    const Pool q = pool_of(y, g.size(2), g.size(3), at_maximum, kernel, stride, padding);
    const Tensor partials = partials_of(a, 2, bn_act_max_pool_backward_partials(a, q), y);
    check(cuda::bn_act_max_pool_backward(a, q, stream), "bn_act_max_pool_backward");
    const Vectors<3> to = merged(a, partials, stream, "bn_act_max_pool_backward");
    return {dz, to[0], to[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps) {
    const OnDevice guard(mean);
    const ScalarType dtype = wide(mean);
    const int64_t channels = mean.numel();
    // a convolution's bias and a checkpoint's weights may have any dtype
    const auto given = [&](const OptTensor& t) { return t ? t->to(dtype).contiguous() : Tensor(); };
    const Tensor in[5] = {given(mean), given(var), given(weight), given(bias), given(conv_bias)};
    const char* names[5] = {"mean", "var", "weight", "bias", "conv_bias"};
    const void* from[5] = {};
    for (int i = 0; i < 5; i++)
        if (in[i].defined()) from[i] = vector(names[i], in[i], channels, wide_options(mean));
    const Vectors<4> to(channels, in[0].options());
    check(cuda::bn_fold(dtype_of(dtype), channels, from[0], from[1], from[2], from[3], from[4], eps, to.pointers,
                        current_stream(mean)),
          "bn_fold");
    return {to[0], to[1], to[2], to[3]};
}

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count) {
    const OnDevice guard(scale);
    const int64_t channels = scale.numel();
    const auto at = [&](const char* name, const Tensor& v) { return vector(name, v, channels, wide_options(scale)); };
    const Vectors<3> to(channels, scale.options(), count ? 3 : 1);
    check(cuda::bn_coefficients(dtype_of(scale.scalar_type(), "scale: "), channels, at("scale", scale),
                                at("rstd", rstd), at("sum_dz", sum_dz), at("sum_dz_y", sum_dz_y), count.value_or(0),
                                to.pointers, current_stream(scale)),
          "bn_coefficients");
    return {to[0], to[1], to[2]};
}

Tensor channels_last(const Tensor& t) {
    const OnDevice guard(t);
    const Tensor to = nhwc("t", t);
    return to.data_ptr() == t.data_ptr() ? to.clone() : to;
}

Tensor contiguous(const Tensor& t) {
    const OnDevice guard(t);
    const Tensor from = nhwc("t", t);
    const Tensor to = empty(t.sizes(), t.options());
    check(cuda::transpose(int(t.element_size()), t.size(0), t.size(2) * t.size(3), t.size(1), from.data_ptr(),
                          to.data_ptr(), current_stream(t)),
          "contiguous");
    return to;
}

}  // namespace fused_resnet::cuda::ops
