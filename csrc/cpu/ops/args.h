// From tensors to the kernels' arguments.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

// Whether the steps of frozen rows of our own take images of this dtype.
inline bool is_row_type(ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::BFloat16; }

// x: channels_last images of such a dtype, of so many channels.
inline void check_images(const Tensor& x, int64_t channels) {
    FR_CHECK(is_row_type(x.scalar_type()) && x.is_channels_last() && x.size(1) == channels,
             "x: expected float32 or bfloat16, channels_last, with ", channels, " channels, got ", x.scalar_type(), " ",
             x.sizes());
}

// bias: so many values in float.
inline void check_bias(const Tensor& bias, int64_t channels) {
    FR_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == channels,
             "bias: expected ", channels, " float32 values, got ", bias.scalar_type(), " ", bias.sizes());
}

inline Layout rows_layout(int64_t channels) { return {channels, 0}; }

inline Args prologue_args(const Tensor& x, TensorList prologue, int64_t act, double act_param) {
    Args a{};
    a.layout = rows_layout(x.size(1));
    a.y_type = dtype_of(x.scalar_type());
    a.act = act_of(act);
    a.act_param = act_param;
    set_norm(a.norm, prologue, x);
    return a;
}

// Args of a raw tensor without a norm
inline Args raw_args(const Tensor& t) {
    Args a{};
    a.layout = rows_layout(t.size(1));
    a.y_type = a.other_type = dtype_of(t.scalar_type());
    a.y = t.data_ptr();
    return a;
}

// The Args that write act(. (+ residual)) to y.
inline Args epilogue_args(const Tensor& y, int64_t act, double act_param, const OptTensor& residual) {
    Args a = raw_args(y);
    a.out = y.data_ptr();
    a.act = act_of(act);
    a.act_param = act_param;
    if (residual) {
        FR_CHECK(residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type() &&
                     residual->is_channels_last(),
                 "residual: expected the output's shape, dtype and layout");
        a.residual = residual->data_ptr();
    }
    return a;
}

// Where a kernel [R, S] of a convolution stands on x, and where its outputs are.
inline Patches patches_of(const Tensor& x, int64_t R, int64_t S, IntList stride, IntList padding, IntList dilation) {
    return {x.data_ptr(),
            x.size(2),
            x.size(3),
            x.size(1),
            output_size(x.size(2), R, stride[0], padding[0], dilation[0]),
            output_size(x.size(3), S, stride[1], padding[1], dilation[1]),
            {R, S},
            {stride[0], stride[1]},
            {padding[0], padding[1]},
            {dilation[0], dilation[1]}};
}

}  // namespace fused_resnet::cpu
