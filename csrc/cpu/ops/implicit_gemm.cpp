// Convolutions for inference as products of matrices. The patches of x that the kernel sees are gathered block by
// block, and bias, residual and activation are applied tile by tile, both in cache. Source: Chetlur et al., cuDNN:
// Efficient Primitives for Deep Learning (arXiv 1410.0759), section 3.
#include "args.h"
#include "ops.h"
#include "product.h"

namespace fused_resnet::cpu {

const GemmKernel& frozen_kernel(ScalarType images) {
    return images == ScalarType::Float ? table().float_gemm : table().bf16_gemm;
}

void check_panels(const Tensor& packed, int64_t channels, ScalarType images) {
    const GemmKernel& kernel = frozen_kernel(images);
    FR_CHECK(packed.dim() == 5 && packed.scalar_type() == multiplied_as(images) && packed.is_contiguous() &&
                 packed.size(4) == kernel.columns,
             "packed: expected what gemm_prepack returns, got ", packed.scalar_type(), " ", packed.sizes());
    FR_CHECK(panels_of(kernel, channels) == packed.size(0), "bias: expected as many channels as were packed, got ",
             channels);
}

bool gemm_suits(const Tensor& x, const Tensor& weight, int64_t groups) {
    if (!is_row_type(x.scalar_type())) return false;
    const int64_t depth = weight.numel() / weight.size(0);
    return x.is_channels_last() && groups == 1 && depth % frozen_kernel(x.scalar_type()).word == 0;
}

Tensor gemm_prepack(const Tensor& weight) {
    FR_CHECK(weight.dim() == 4 && is_row_type(weight.scalar_type()) && weight.numel() > 0,
             "weight: expected float32 or bfloat16 [K, C, R, S], got ", weight.scalar_type(), " ", weight.sizes());
    const GemmKernel& kernel = frozen_kernel(weight.scalar_type());
    const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3), depth = R * S * C;
    FR_CHECK(depth % kernel.word == 0, "weight: expected an even number of values per channel, got ", depth);
    const Tensor w = weight.to(multiplied_as(weight.scalar_type())).contiguous(kRows),
                 packed = empty({panels_of(kernel, K), R, S, C, kernel.columns}, w.options());
    pack(kernel, {depth, K, w.data_ptr(), 1, depth, packed.data_ptr()}, 0, depth);
    return packed;
}

void gemm_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                   IntList dilation, int64_t act, double act_param, const OptTensor& residual, const Tensor& out) {
    FR_CHECK(is_row_type(x.scalar_type()), "x: expected float32 or bfloat16, got ", x.scalar_type());
    check_panels(packed, bias.numel(), x.scalar_type());
    check_bias(bias, bias.numel());
    const int64_t K = bias.numel(), C = packed.size(3), R = packed.size(1), S = packed.size(2);
    FR_CHECK(x.is_channels_last() && x.size(1) == C, "x: expected channels_last, with ", C, " channels, got ",
             x.sizes());
    const Patches patches = patches_of(x, R, S, stride, padding, dilation);
    const int64_t height = patches.out_height, width = patches.out_width;
    FR_CHECK(out.scalar_type() == x.scalar_type() && out.is_channels_last() && out.size(0) == x.size(0) &&
                 out.size(1) == K && out.size(2) == height && out.size(3) == width,
             "out: expected the convolution's result, of x's dtype, channels_last, got ", out.scalar_type(), " ",
             out.sizes());
    float* const c = x.scalar_type() == ScalarType::Float ? static_cast<float*>(out.data_ptr()) : nullptr;
    const bool onto = c && residual && residual->data_ptr() == out.data_ptr();  // then the products are added to it
    Args post = epilogue_args(out, act, act_param, residual);
    if (onto) post.residual = nullptr;
    post.norm.shift = bias.data_ptr();
    Gemm g{x.size(0) * height * width, K, R * S * C, x.data_ptr(), C, 1, packed.data_ptr(), c, K, onto};
    const bool is_x = R * S == 1 && stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
    if (!is_x) g.patches = &patches;
    g.epilogue = &post;
    multiply(frozen_kernel(x.scalar_type()), g);
}

}  // namespace fused_resnet::cpu
