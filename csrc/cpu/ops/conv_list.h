// What conv.cpp chooses among before ATen's convolutions: matrix products, Winograd's algorithm, and products of
// patches.
#pragma once

#include "ops.h"

namespace fused_resnet::cpu {

// 1x1, gemm.cpp
bool is_gemm(const Image& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups);
// The pixels that a strided 1x1 convolution reads, and y added to those of x.
Tensor strided(const Tensor& x, IntList stride);
void add_strided(const Tensor& x, IntList stride, const Tensor& y);
std::tuple<Tensor, Tensor, Tensor> gemm_stats(const Tensor& x, const Tensor& weight, TensorList prologue, int64_t act,
                                              double act_param, bool stats, ScalarType compute);
std::tuple<Tensor, Tensor, Tensor, Tensor> gemm_backward(const Tensor& dz, const Tensor& y, TensorList coef,
                                                         const Tensor& x, TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, bool need_input,
                                                         bool need_weight, const OptTensor& add, ScalarType compute);

// 3x3, stride 1, winograd.cpp
bool is_winograd(const Image& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                 int64_t groups, bool packed, int64_t rate);
// out = conv3x3(input as `in` sees it), then what `post` says; backward: with the kernel turned, from K to C channels.
void winograd(const Args& in, const Tensor& x, const Tensor& weight, bool backward, const Args& post, const Tensor& out,
              int64_t padding);
Tensor winograd_backward_weight(Args in, const Tensor& x, const Tensor& dy, int64_t padding);
Tensor winograd_output(const Tensor& x, int64_t channels, int64_t padding);

// any kernel, channels_last, one group, implicit_gemm.cpp; x, dy and weight in a dtype that our kernels multiply
bool is_implicit_gemm(const Image& x, const Tensor& weight, int64_t groups, int64_t word);
Tensor implicit_gemm(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation);
// of stride 1
Tensor implicit_gemm_backward_input(const Tensor& dy, const Tensor& weight, IntList padding, IntList dilation);
// in float
Tensor implicit_gemm_backward_weight(const Tensor& x, const Tensor& dy, const Tensor& weight, IntList stride,
                                     IntList padding, IntList dilation);

}  // namespace fused_resnet::cpu
