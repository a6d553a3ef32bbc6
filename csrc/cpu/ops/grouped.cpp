// Convolutions of several groups for inference.
#include "arena.h"
#include "args.h"
#include "ops.h"
#include "product.h"

namespace fused_resnet::cpu {

bool grouped_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups) {
    return is_row_type(x.scalar_type()) && x.is_channels_last() && groups > 1 && weight.size(1) > 1 &&
           dilation[0] == 1 && dilation[1] == 1;
}

Tensor grouped_prepack(const Tensor& weight, int64_t groups) {
    FR_CHECK(weight.dim() == 4 && is_row_type(weight.scalar_type()) && groups > 0 && weight.size(0) % groups == 0,
             "weight: expected float32 or bfloat16 [K, C, R, S] of ", groups, " groups, got ", weight.scalar_type(),
             " ", weight.sizes());
    const IntList s = weight.strides();
    const int64_t columns = weight.size(0) / groups;
    return pack_runs(weight.view({groups, weight.size(2), weight.size(3), weight.size(1), columns},
                                 {columns * s[0], s[2], s[3], s[1], s[0]}));
}

Tensor grouped_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                        int64_t act, double act_param, const OptTensor& residual) {
    FR_CHECK(is_packed_runs(packed, x.scalar_type()), "packed: expected what grouped_prepack returns, got ",
             packed.sizes());
    const int64_t groups = packed.size(0), R = packed.size(1), S = packed.size(2), depth = packed.size(3),
                  K = groups * packed.size(4);
    check_images(x, groups * depth);
    check_bias(bias, K);
    const int64_t undilated[] = {1, 1};
    const Patches q = patches_of(x, R, S, stride, padding, undilated);
    const Tensor out = result({x.size(0), K, q.out_height, q.out_width}, x.options());
    Args a = epilogue_args(out, act, act_param, residual);
    a.norm.shift = bias.data_ptr();
    const void* const weight = packed.data_ptr();
    parallel(0, x.size(0) * groups * q.out_height, 1, [&](int64_t begin, int64_t end) {
        float* const rows = scratch(R * (q.width + 2 * padding[1]) * depth);
        table().grouped(a, q, weight, groups, rows, begin, end);
    });
    return out;
}

}  // namespace fused_resnet::cpu
