// Convolutions and their gradients as products of matrices. The patches of x that the kernel sees are gathered block by
// block, and in inference bias, residual and activation are applied tile by tile, both in cache. Source: Chetlur et
// al., cuDNN: Efficient Primitives for Deep Learning (arXiv 1410.0759), section 3.
#include "args.h"
#include "conv_list.h"
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

namespace {

// A weight [K, C, R, S] as the right operand [R * S * C, K], in panels. turned: of the gradient of the input, which is
// a convolution of dy with the kernel turned, from K to C channels: [R * S * K, C].
Tensor pack_weight(const Tensor& weight, bool turned) {
    const GemmKernel& kernel = frozen_kernel(weight.scalar_type());
    const int64_t R = weight.size(2), S = weight.size(3), inputs = weight.size(!turned), outputs = weight.size(turned);
    const int64_t depth = R * S * inputs;
    FR_CHECK(depth % kernel.word == 0, "weight: expected an even number of values per channel, got ", depth);
    const Tensor w = weight.to(multiplied_as(weight.scalar_type())),
                 packed = empty({panels_of(kernel, outputs), R, S, inputs, kernel.columns}, w.options());
    const int64_t row = w.stride(!turned), column = w.stride(turned);
    if (inputs % kernel.word == 0) {
        for (int64_t tap = 0; tap < R * S; tap++) {
            const int64_t of = turned ? R * S - 1 - tap : tap, first = tap * inputs;
            const char* const from = bytes(w, of / S * w.stride(2) + of % S * w.stride(3));
            pack(kernel, {depth, outputs, from, row, column, packed.data_ptr(), first}, first, first + inputs);
        }
        return packed;
    }
    // a word holds values of two taps
    const Tensor turn = turned ? call("aten::flip", w, IntList({2, 3}))[0] : w;
    const IntList s = turn.strides();
    const Tensor rows = turn.view({outputs, inputs, R, S}, {s[turned], s[!turned], s[2], s[3]}).contiguous(kRows);
    pack(kernel, {depth, outputs, rows.data_ptr(), 1, depth, packed.data_ptr()}, 0, depth);
    return packed;
}

}  // namespace

Tensor gemm_prepack(const Tensor& weight) {
    FR_CHECK(weight.dim() == 4 && is_row_type(weight.scalar_type()) && weight.numel() > 0,
             "weight: expected float32 or bfloat16 [K, C, R, S], got ", weight.scalar_type(), " ", weight.sizes());
    return pack_weight(weight, false);
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

bool is_implicit_gemm(const Image& x, const Tensor& weight, int64_t groups, int64_t word) {
    return groups == 1 && x.format() == kRows && weight.size(2) * weight.size(3) * x.channels % word == 0;
}

namespace {

Tensor product_of_patches(const Tensor& x, const Tensor& packed, int64_t channels, IntList stride, IntList padding,
                          IntList dilation) {
    const Patches q = patches_of(x, packed.size(1), packed.size(2), stride, padding, dilation);
    const Tensor y = empty({x.size(0), channels, q.out_height, q.out_width}, x.options(), kRows);
    const Tensor none = zeros({channels}, x.options().dtype(ScalarType::Float));
    gemm_bias_act(x, packed, none, stride, padding, dilation, int64_t(Act::identity), 0, std::nullopt, y);
    return y;
}

}  // namespace

Tensor implicit_gemm(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation) {
    return product_of_patches(x, pack_weight(weight, false), weight.size(0), stride, padding, dilation);
}

Tensor implicit_gemm_backward_input(const Tensor& dy, const Tensor& weight, IntList padding, IntList dilation) {
    const std::array<int64_t, 2> one = {1, 1}, outside = {dilation[0] * (weight.size(2) - 1) - padding[0],
                                                          dilation[1] * (weight.size(3) - 1) - padding[1]};
    return product_of_patches(dy, pack_weight(weight, true), weight.size(1), one, outside, dilation);
}

Tensor implicit_gemm_backward_weight(const Tensor& x, const Tensor& dy, const Tensor& weight, IntList stride,
                                     IntList padding, IntList dilation) {
    const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3), depth = R * S * C;
    const Patches q = patches_of(x, R, S, stride, padding, dilation);
    // dW is the product of the transposed patches [R * S * C, pixels] and dy [pixels, K]
    const Tensor dw = empty({depth, K}, x.options().dtype(ScalarType::Float));
    Gemm g{depth, K, 0, nullptr, 0, 0, nullptr, static_cast<float*>(dw.data_ptr()), K, false};
    g.patches = &q;
    g.transposed = true;
    multiply_packing(*gemm_kernel_of(x.scalar_type()), g, {dy.data_ptr(), dy.numel() / K, K, K, 1}, x.scalar_type());
    return dw.view({K, C, R, S}, {1, K, S * C * K, C * K});
}

}  // namespace fused_resnet::cpu
