// The CUDA backend's primitives on tensors; fused_resnet/backends/__init__.py says what each computes.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "kernels.h"

namespace fused_resnet::cuda {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using IntList = at::IntArrayRef;

// The device's current stream, torch's.
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

// What torch.ops.fused_resnet_cuda runs for tensors of one dispatch key.
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
}

}  // namespace ops

}  // namespace fused_resnet::cuda
