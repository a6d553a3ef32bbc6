// The CPU backend's primitives on tensors; fused_resnet/backends/primitives.py says what each computes.
#pragma once

#include <string>
#include <string_view>
#include <tuple>

#include "launch.h"

namespace fused_resnet::cpu {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y);
Tensor bn_act(const Tensor& y, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              TensorList residual_norm, ScalarType out_dtype);
void bn_act_in_place(const Tensor& y, TensorList norm, int64_t act, double act_param, const OptTensor& residual);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y, TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           TensorList residual_norm);
Tensor bn_backward(const Tensor& dz, const Tensor& y, TensorList coef, ScalarType out_dtype);
std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& y, TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding);
std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax, const Tensor& y,
                                                            TensorList norm, int64_t act, double act_param,
                                                            IntList kernel, IntList stride, IntList padding,
                                                            ScalarType out_dtype);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_fold(const Tensor& mean, const Tensor& var, const OptTensor& weight,
                                                   const OptTensor& bias, const OptTensor& conv_bias, double eps);
std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& scale, const Tensor& rstd, const Tensor& sum_dz,
                                                   const Tensor& sum_dz_y, std::optional<int64_t> count);
std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const Tensor& weight, IntList stride, IntList padding,
                                              IntList dilation, int64_t groups, TensorList prologue, int64_t act,
                                              double act_param, bool stats, ScalarType compute, bool gemm,
                                              int64_t products);
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(const Tensor& dz, const Tensor& y, TensorList coef,
                                                         const Tensor& x, TensorList prologue, int64_t act,
                                                         double act_param, const Tensor& weight, IntList stride,
                                                         IntList padding, IntList dilation, int64_t groups,
                                                         bool need_input, bool need_weight, const OptTensor& add,
                                                         ScalarType compute, bool gemm, int64_t products);

// The name of the algorithm of such a convolution: of conv_stats ("fprop"), or of the gradient of the input ("dgrad")
// or of the weight ("wgrad"). Reads sizes and layouts only.
std::string conv_algorithm(std::string_view kind, const Tensor& x, const Tensor& weight, IntList stride,
                           IntList padding, IntList dilation, int64_t groups, bool prologue, ScalarType compute,
                           bool gemm, int64_t products);

// Inference without folding: act(norm(conv(x)) (+ residual)).
Tensor conv_bn_act(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                   int64_t groups, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
                   ScalarType compute, bool gemm, int64_t products);

// A row of chains, its backward, and inference: the operators of fused_resnet/chain/operators.py, whose
// spec is given as the two vectors that `ints_and_reals` in fused_resnet/backends/cpu.py makes of it.
std::vector<Tensor> row_forward(const Tensor& x, const OptTensor& residual, TensorList params, const Tensor& ints,
                                const Tensor& reals, ScalarType compute, bool gemm);
std::vector<Tensor> row_backward(const Tensor& dout, const Tensor& x, const OptTensor& residual, TensorList weights,
                                 TensorList saved, const Tensor& ints, const Tensor& reals, const Tensor& needs,
                                 ScalarType compute, bool gemm);
Tensor row_inference(const Tensor& x, const OptTensor& residual, TensorList params, const Tensor& ints,
                     const Tensor& reals, ScalarType compute, bool gemm);

// A frozen row: its tensors, and its steps as the two vectors that fused_resnet/backends/cpu_steps.py makes of them.
Tensor frozen_row(const Tensor& x, const OptTensor& residual, TensorList tensors, const Tensor& ints,
                  const Tensor& reals);

// Inference by Winograd: the outputs per side of a tile (0: not used), the transformed weights, and
// act(conv(x) + bias (+ residual)).
bool winograd_suits(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                    int64_t groups);
int64_t winograd_tile(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups);
Tensor winograd_prepack(const Tensor& weight, int64_t tile);
Tensor winograd_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t padding, int64_t act,
                         double act_param, const OptTensor& residual);

// Inference by products of matrices: whether they take a convolution, the packed weight, and
// out = act(conv(x) + bias (+ residual)), where out may be the residual.
bool gemm_suits(const Tensor& x, const Tensor& weight, int64_t groups);
Tensor gemm_prepack(const Tensor& weight);
void gemm_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                   IntList dilation, int64_t act, double act_param, const OptTensor& residual, const Tensor& out);

// Inference by depthwise kernels: whether they take a convolution, the packed weight, and act(conv(x) + bias (+
// residual)).
bool depthwise_suits(const Tensor& x, const Tensor& weight, int64_t groups);
Tensor depthwise_prepack(const Tensor& weight);
Tensor depthwise_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                          IntList dilation, int64_t act, double act_param, const OptTensor& residual);

// The same by the kernel for several groups.
bool grouped_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups);
Tensor grouped_prepack(const Tensor& weight, int64_t groups);
Tensor grouped_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                        int64_t act, double act_param, const OptTensor& residual);

// Squeeze-and-excitation in place: x *= gate(gate_weight act(weight mean(x) + bias) + gate_bias), a factor per image
// and channel.
void excite(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t act, double act_param,
            const Tensor& gate_weight, const Tensor& gate_bias, int64_t gate, double gate_param);

// The mean of each channel of x: [N, C, 1, 1].
Tensor channel_means(const Tensor& x);

// Inference of a stem in one pass: whether there is one, the packed weight, and max-pool(act(conv(x) + bias)).
bool stem_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups, IntList pool_kernel);
Tensor stem_prepack(const Tensor& weight);
Tensor stem_bias_act_max_pool(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride,
                              IntList padding, int64_t act, double act_param, IntList pool_kernel, IntList pool_stride,
                              IntList pool_padding);

// out (+)= a b: float32 matrices, a and b with any strides. What tests and benchmarks see of the products above.
void matmul(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate);

}  // namespace fused_resnet::cpu
