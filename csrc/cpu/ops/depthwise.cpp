// Depthwise convolutions for inference.
#include "arena.h"
#include "args.h"
#include "ops.h"

namespace fused_resnet::cpu {

bool depthwise_suits(const Tensor& x, const Tensor& weight, int64_t groups) {
    return is_row_type(x.scalar_type()) && x.is_channels_last() && groups == x.size(1) && groups == weight.size(0);
}

Tensor depthwise_prepack(const Tensor& weight) {
    FR_CHECK(weight.dim() == 4 && is_row_type(weight.scalar_type()) && weight.size(1) == 1,
             "weight: expected float32 or bfloat16 [C, 1, R, S], got ", weight.scalar_type(), " ", weight.sizes());
    const Tensor w = weight.to(ScalarType::Float);
    const IntList s = w.strides();
    return w.view({w.size(2), w.size(3), w.size(0)}, {s[2], s[3], s[0]}).contiguous();
}

Tensor depthwise_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                          IntList dilation, int64_t act, double act_param, const OptTensor& residual) {
    FR_CHECK(packed.dim() == 3 && packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
             "packed: expected what depthwise_prepack returns, got ", packed.sizes());
    const int64_t R = packed.size(0), S = packed.size(1), C = packed.size(2);
    check_images(x, C);
    check_bias(bias, C);
    const Patches q = patches_of(x, R, S, stride, padding, dilation);
    const Tensor out = result({x.size(0), C, q.out_height, q.out_width}, x.options());
    Args a = epilogue_args(out, act, act_param, residual);
    a.norm.shift = bias.data_ptr();
    const auto* const weight = static_cast<const float*>(packed.data_ptr());
    const int64_t blocks = (C + kDepthwiseBlock - 1) / kDepthwiseBlock;
    parallel(0, x.size(0) * blocks * q.out_height, 1,
             [&](int64_t begin, int64_t end) { table().depthwise(a, q, weight, begin, end); });
    return out;
}

}  // namespace fused_resnet::cpu
