#include "ops.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "tensors.h"

namespace fused_resnet::cuda::ops {

namespace {

void check(Status status, const char* name) {
    TORCH_CHECK(status == nullptr, "fused_resnet_cuda::", name, ": ", status);
}

DType dtype_of(const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kDouble: return DType::f64;
        case at::kFloat: return DType::f32;
        case at::kBFloat16: return DType::bf16;
        case at::kHalf: return DType::f16;
        default: TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64, got ", t.scalar_type());
    }
}
// The dtype of statistics and per-channel vectors.
at::ScalarType wide(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace

Tensor empty_nhwc(IntList nchw, const at::TensorOptions& options) {
    return at::empty({nchw[0], nchw[2], nchw[3], nchw[1]}, options).permute({0, 3, 1, 2});
}

Tensor nhwc(const char* name, const Tensor& t) {
    TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W], got ", t.sizes());
    if (t.is_contiguous(at::MemoryFormat::ChannelsLast)) return t;
    if (!t.is_contiguous()) return t.contiguous(at::MemoryFormat::ChannelsLast);
    const Tensor to = empty_nhwc(t.sizes(), t.options());
    check(cuda::transpose(int(t.element_size()), t.size(0), t.size(1), t.size(2) * t.size(3), t.const_data_ptr(),
                          to.mutable_data_ptr(), current_stream(t.device())),
          name);
    return to;
}

Tensor like(const char* name, const Tensor& t, const Tensor& y, const char* what) {
    TORCH_CHECK(t.sizes() == y.sizes() && t.scalar_type() == y.scalar_type() && t.device() == y.device(), name,
                ": expected ", what, "'s shape, dtype and device, ", y.sizes(), " in ", y.scalar_type(), " on ",
                y.device(), ", got ", t.sizes(), " in ", t.scalar_type(), " on ", t.device());
    return nhwc(name, t);
}

Act act_of(int64_t index) {
    TORCH_CHECK(index >= 0 && index <= static_cast<int64_t>(Act::hardswish), "act: no activation ", index);
    return static_cast<Act>(index);
}

namespace {

// An uninitialised NHWC tensor like `like`, with another height and width.
Tensor empty_nhwc(const Tensor& like, int64_t height, int64_t width, at::ScalarType dtype) {
    return ops::empty_nhwc({like.size(0), like.size(1), height, width}, like.options().dtype(dtype));
}

// A vector of y's channels, in the wide dtype.
const void* vector(const char* name, const Tensor& v, int64_t channels, at::ScalarType dtype,
                   const at::Device& device) {
    TORCH_CHECK(
        v.dim() == 1 && v.size(0) == channels && v.scalar_type() == dtype && v.is_contiguous() && v.device() == device,
        name, ": expected contiguous vectors of ", channels, " values in ", dtype, " on ", device, ", got ", v.sizes(),
        " in ", v.scalar_type(), " on ", v.device());
    return v.const_data_ptr();
}

// [scale, shift] or [scale, shift, center].
Affine affine_of(const char* name, at::TensorList norm, const Tensor& y, bool center) {
    TORCH_CHECK(norm.size() == (center ? 3 : 2), name, ": expected [scale, shift", center ? ", center" : "", "], got ",
                norm.size(), " tensors");
    const auto at = [&](size_t i) { return vector(name, norm[i], y.size(1), wide(y), y.device()); };
    return {at(0), at(1), center ? at(2) : nullptr};
}

// y and what follows from it.
Pass pass_of(const Tensor& y) {
    Pass a{};
    a.dtype = dtype_of("y", y);
    a.rows = y.size(0) * y.size(2) * y.size(3);
    a.channels = y.size(1);
    a.y = y.const_data_ptr();
    return a;
}

Pool pool_of(const Tensor& y, int64_t out_height, int64_t out_width, uint8_t* argmax, IntList kernel, IntList stride,
             IntList padding) {
    TORCH_CHECK(y.size(0) * (y.size(2) + 2 * padding[0] + 1) < std::numeric_limits<int>::max() &&
                    y.size(3) + 2 * padding[1] < std::numeric_limits<int>::max(),
                "y: expected fewer than 2^31 rows of images, got ", y.sizes());
    TORCH_CHECK(kernel[0] * kernel[1] <= 256, "kernel: expected a window of at most 256 places, got ", kernel);
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

    Vectors(int64_t channels, const at::TensorOptions& options, size_t count = N) {
        for (size_t i = 0; i < N; i++) {
            tensors[i] = at::empty({i < count ? channels : 0}, options);
            if (i < count) pointers[i] = tensors[i].mutable_data_ptr();
        }
    }
    const Tensor& operator[](size_t i) const { return tensors[i]; }
};

// A reduction's partial results, `kinds` of them.
Tensor partials_of(Pass& a, int kinds, int64_t rows, const Tensor& y) {
    const Tensor partials = at::empty({kinds, rows, a.channels}, y.options().dtype(wide(y)));
    char* const first = static_cast<char*>(partials.mutable_data_ptr());
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
    const c10::DeviceGuard guard(given.device());
    const Tensor y = nhwc("y", given);
    const Stream stream = current_stream(y.device());
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

Tensor bn_act(const Tensor& given, at::TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              at::TensorList residual_norm) {
    const c10::DeviceGuard guard(given.device());
    const Tensor y = nhwc("y", given), r = residual ? like("residual", *residual, y) : Tensor();
    const Tensor out = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, false);
    if (r.defined()) a.residual = r.const_data_ptr();
    if (!residual_norm.empty()) a.residual_norm = affine_of("residual_norm", residual_norm, y, false);
    a.out = out.mutable_data_ptr();
    check(cuda::bn_act(a, current_stream(y.device())), "bn_act");
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& given, at::TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           at::TensorList residual_norm) {
    const c10::DeviceGuard guard(given.device());
    const Tensor y = nhwc("y", given), r = residual ? like("residual", *residual, y) : Tensor(),
                 g = like("dout", dout, y);
    const Tensor dz = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    const Stream stream = current_stream(y.device());
    const bool third = r.defined() && !residual_norm.empty();
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, true);
    if (r.defined()) a.residual = r.const_data_ptr();
    if (third) a.residual_norm = affine_of("residual_norm", residual_norm, y, true);
    a.grad = g.const_data_ptr();
    a.out = dz.mutable_data_ptr();
    const Tensor partials = partials_of(a, third ? 3 : 2, bn_act_backward_split(a).partials, y);
    check(cuda::bn_act_backward(a, stream), "bn_act_backward");
    const Vectors<3> to = merged(a, partials, stream, "bn_act_backward");
    return {dz, to[0], to[1], to[2]};
}

Tensor bn_backward(const Tensor& dz, const Tensor& given, at::TensorList coef) {
    const c10::DeviceGuard guard(given.device());
    TORCH_CHECK(coef.size() == 1 || coef.size() == 4, "coef: expected [a] or [a, b, c, center], got ", coef.size(),
                " tensors");
    const Tensor y = nhwc("y", given), g = like("dz", dz, y);
    const Tensor dy = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    Pass a = pass_of(y);
    for (size_t i = 0; i < coef.size(); i++) {
        const void* v = vector("coef", coef[i], a.channels, wide(y), y.device());
        if (i < 3) a.coef[i] = v;
        else a.norm.center = v;
    }
    a.grad = g.const_data_ptr();
    a.out = dy.mutable_data_ptr();
    check(cuda::bn_backward(a, current_stream(y.device())), "bn_backward");
    return dy;
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& given, at::TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding) {
    const c10::DeviceGuard guard(given.device());
    const Tensor y = nhwc("y", given);
    int64_t size[2];
    for (int i = 0; i < 2; i++) {
        TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && 2 * padding[i] <= kernel[i] &&
                        y.size(2 + i) + 2 * padding[i] >= kernel[i],
                    "kernel: expected a window inside the padded image, got kernel ", kernel, ", stride ", stride,
                    ", padding ", padding, " for ", y.sizes());
        size[i] = (y.size(2 + i) + 2 * padding[i] - kernel[i]) / stride[i] + 1;
    }
    const Tensor out = empty_nhwc(y, size[0], size[1], y.scalar_type()),
                 argmax = empty_nhwc(y, size[0], size[1], at::kByte);
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, false);
    a.out = out.mutable_data_ptr();
    const Pool q = pool_of(y, size[0], size[1], argmax.mutable_data_ptr<uint8_t>(), kernel, stride, padding);
    check(cuda::bn_act_max_pool(a, q, current_stream(y.device())), "bn_act_max_pool");
    return {out, argmax};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax,
                                                            const Tensor& given, at::TensorList norm, int64_t act,
                                                            double act_param, IntList kernel, IntList stride,
                                                            IntList padding) {
    const c10::DeviceGuard guard(given.device());
    TORCH_CHECK(dout.scalar_type() == given.scalar_type(), "dout: expected y's dtype ", given.scalar_type(), ", got ",
                dout.scalar_type());
    TORCH_CHECK(argmax.scalar_type() == at::kByte && argmax.sizes() == dout.sizes(),
                "argmax: expected uint8 of dout's shape ", dout.sizes(), ", got ", argmax.sizes(), " in ",
                argmax.scalar_type());
    const Tensor y = nhwc("y", given), g = nhwc("dout", dout), places = nhwc("argmax", argmax);
    const Tensor dz = empty_nhwc(y, y.size(2), y.size(3), y.scalar_type());
    const Stream stream = current_stream(y.device());
    Pass a = pass_of(y);
    a.act = act_of(act);
    a.act_param = act_param;
    a.norm = affine_of("norm", norm, y, true);
    a.grad = g.const_data_ptr();
    a.out = dz.mutable_data_ptr();
    // only read, by this direction
    auto* const at_maximum = const_cast<uint8_t*>(places.const_data_ptr<uint8_t>());
    const Pool q = pool_of(y, g.size(2), g.size(3), at_maximum, kernel, stride, padding);
    const Tensor partials = partials_of(a, 2, bn_act_max_pool_backward_partials(a, q), y);
    check(cuda::bn_act_max_pool_backward(a, q, stream), "bn_act_max_pool_backward");
    const Vectors<3> to = merged(a, partials, stream, "bn_act_max_pool_backward");
    return {dz, to[0], to[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps) {
    const c10::DeviceGuard guard(mean.device());
    const at::ScalarType dtype = wide(mean);
    const int64_t channels = mean.numel();
    // a convolution's bias and a checkpoint's weights may have any dtype
    const auto given = [&](const OptTensor& t) { return t ? t->to(dtype).contiguous() : Tensor(); };
    const Tensor in[5] = {given(mean), given(var), given(weight), given(bias), given(conv_bias)};
    const char* names[5] = {"mean", "var", "weight", "bias", "conv_bias"};
    const void* from[5] = {};
    for (int i = 0; i < 5; i++)
        if (in[i].defined()) from[i] = vector(names[i], in[i], channels, dtype, mean.device());
    const Vectors<4> to(channels, in[0].options());
    check(cuda::bn_fold(dtype_of("mean", in[0]), channels, from[0], from[1], from[2], from[3], from[4], eps,
                        to.pointers, current_stream(mean.device())),
          "bn_fold");
    return {to[0], to[1], to[2], to[3]};
}

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count) {
    const c10::DeviceGuard guard(scale.device());
    const int64_t channels = scale.numel();
    const auto at = [&](const char* name, const Tensor& v) {
        return vector(name, v, channels, wide(scale), scale.device());
    };
    const Vectors<3> to(channels, scale.options(), count ? 3 : 1);
    check(cuda::bn_coefficients(dtype_of("scale", scale), channels, at("scale", scale), at("rstd", rstd),
                                at("sum_dz", sum_dz), at("sum_dz_y", sum_dz_y), count.value_or(0), to.pointers,
                                current_stream(scale.device())),
          "bn_coefficients");
    return {to[0], to[1], to[2]};
}

Tensor channels_last(const Tensor& t) {
    const c10::DeviceGuard guard(t.device());
    const Tensor to = nhwc("t", t);
    return to.is_set_to(t) ? to.clone() : to;
}

Tensor contiguous(const Tensor& t) {
    const c10::DeviceGuard guard(t.device());
    const Tensor from = nhwc("t", t);
    const Tensor to = at::empty(t.sizes(), t.options());
    check(cuda::transpose(int(t.element_size()), t.size(0), t.size(2) * t.size(3), t.size(1), from.const_data_ptr(),
                          to.mutable_data_ptr(), current_stream(t.device())),
          "contiguous");
    return to;
}

}  // namespace fused_resnet::cuda::ops
