// The CUDA backend's primitives on tensors; fused_resnet/backends/primitives.py says what each computes.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace fused_resnet::cuda {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using IntList = at::IntArrayRef;

// torch's current stream of the device.
Stream current_stream(const at::Device& device);

namespace ops {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y);
Tensor bn_act(const Tensor& y, at::TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              at::TensorList residual_norm);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y, at::TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           at::TensorList residual_norm);
Tensor bn_backward(const Tensor& dz, const Tensor& y, at::TensorList coef);
std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& y, at::TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding);
std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax, const Tensor& y,
                                                            at::TensorList norm, int64_t act, double act_param,
                                                            IntList kernel, IntList stride, IntList padding);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps);
std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count);
Tensor channels_last(const Tensor& t);
Tensor contiguous(const Tensor& t);

#ifdef FUSED_RESNET_CUTLASS
// In conv_ops.cpp. `kind`: fprop, dgrad or wgrad. `tile`: one of conv_tiles, which is a list m, n, m, n, ...
std::optional<std::string> conv_why_not(std::string_view kind, const Tensor& x, const Tensor& weight, IntList stride,
                                        IntList padding, IntList dilation, int64_t groups);
std::vector<int64_t> conv_tiles(std::string_view kind, const Tensor& x);
Tensor conv_bias_act(const Tensor& x, const Tensor& weight, const OptTensor& bias, IntList stride, IntList padding,
                     IntList dilation, int64_t groups, int64_t act, double act_param, const OptTensor& residual,
                     IntList tile);
Tensor conv_backward_input(const Tensor& dy, const Tensor& weight, IntList size, IntList stride, IntList padding,
                           IntList dilation, int64_t groups, const OptTensor& add, IntList tile);
Tensor conv_backward_weight(const Tensor& dy, const Tensor& x, IntList kernel, IntList stride, IntList padding,
                            IntList dilation, int64_t groups, IntList tile);
#endif

// Registers the functions of torch.ops.fused_resnet_cuda for tensors of one dispatch key.
inline void implement(torch::Library& m) {
    m.impl("bn_stats", bn_stats);
    m.impl("bn_act", bn_act);
    m.impl("bn_act_backward", bn_act_backward);
    m.impl("bn_backward", bn_backward);
    m.impl("bn_act_max_pool", bn_act_max_pool);
    m.impl("bn_act_max_pool_backward", bn_act_max_pool_backward);
    m.impl("bn_fold", bn_fold);
    m.impl("bn_coefficients", bn_coefficients);
    m.impl("channels_last", channels_last);
    m.impl("contiguous", contiguous);
#ifdef FUSED_RESNET_CUTLASS
    m.impl("conv_why_not", conv_why_not);
    m.impl("conv_tiles", conv_tiles);
    m.impl("conv_bias_act", conv_bias_act);
    m.impl("conv_backward_input", conv_backward_input);
    m.impl("conv_backward_weight", conv_backward_weight);
#endif
}

}  // namespace ops

}  // namespace fused_resnet::cuda
