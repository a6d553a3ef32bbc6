// The CUDA backend's primitives on tensors; fused_resnet/backends/primitives.py says what each computes.
#pragma once

#include "../box.h"
#include "kernels.h"

namespace fused_resnet::cuda {

// PyTorch's current stream of the tensor's device.
Stream current_stream(const Tensor& t);

// Makes the tensor's device the current one.
class OnDevice {
    DeviceGuardHandle guard = nullptr;

  public:
    explicit OnDevice(const Tensor& t) {
        const Options o = t.options();
        if (o.device == kCuda) fused_resnet::check(aoti_torch_create_device_guard(o.index, &guard), "the device");
    }
    ~OnDevice() {
        if (guard != nullptr) aoti_torch_delete_device_guard(guard);
    }
    OnDevice(const OnDevice&) = delete;
};

namespace ops {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& y);
Tensor bn_act(const Tensor& y, TensorList norm, int64_t act, double act_param, const OptTensor& residual,
              TensorList residual_norm);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dout, const Tensor& y, TensorList norm,
                                                           int64_t act, double act_param, const OptTensor& residual,
                                                           TensorList residual_norm);
Tensor bn_backward(const Tensor& dz, const Tensor& y, TensorList coef);
std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& y, TensorList norm, int64_t act, double act_param,
                                           IntList kernel, IntList stride, IntList padding);
std::tuple<Tensor, Tensor, Tensor> bn_act_max_pool_backward(const Tensor& dout, const Tensor& argmax, const Tensor& y,
                                                            TensorList norm, int64_t act, double act_param,
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
inline void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("bn_stats", Boxed<bn_stats>::call);
    m.impl("bn_act", Boxed<bn_act>::call);
    m.impl("bn_act_backward", Boxed<bn_act_backward>::call);
    m.impl("bn_backward", Boxed<bn_backward>::call);
    m.impl("bn_act_max_pool", Boxed<bn_act_max_pool>::call);
    m.impl("bn_act_max_pool_backward", Boxed<bn_act_max_pool_backward>::call);
    m.impl("bn_fold", Boxed<bn_fold>::call);
    m.impl("bn_coefficients", Boxed<bn_coefficients>::call);
    m.impl("channels_last", Boxed<channels_last>::call);
    m.impl("contiguous", Boxed<contiguous>::call);
#ifdef FUSED_RESNET_CUTLASS
    m.impl("conv_why_not", Boxed<conv_why_not>::call);
    m.impl("conv_tiles", Boxed<conv_tiles>::call);
    m.impl("conv_bias_act", Boxed<conv_bias_act>::call);
    m.impl("conv_backward_input", Boxed<conv_backward_input>::call);
    m.impl("conv_backward_weight", Boxed<conv_backward_weight>::call);
#endif
}

}  // namespace ops

}  // namespace fused_resnet::cuda
