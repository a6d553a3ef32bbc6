// A network's stem in inference: convolution of an image, bias, activation and max-pool in one pass.
#include "launch.h"
#include "ops.h"

namespace fused_resnet::cpu {

bool stem_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups, IntList pool_kernel) {
    // with fewer registers the sums live in memory, and oneDNN's convolution is faster
    return table().registers >= 32 && x.scalar_type() == at::kFloat && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
           x.size(1) <= 4 && weight.size(0) % kStemBlock == 0 && groups == 1 && dilation[0] == 1 && dilation[1] == 1 &&
           pool_kernel[0] <= kStemWindow;
}

Tensor stem_prepack(const Tensor& weight) {
    const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
    TORCH_CHECK(weight.scalar_type() == at::kFloat && K % kStemBlock == 0, "weight: expected float32 and a multiple of ", kStemBlock,
                " output channels, got ", weight.scalar_type(), " and ", K);
    return weight.view({K / kStemBlock, kStemBlock, C, R, S}).permute({0, 3, 4, 2, 1}).contiguous();
}

Tensor stem_bias_act_max_pool(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride, IntList padding,
                              int64_t act, double act_param, IntList pool_kernel, IntList pool_stride, IntList pool_padding) {
    TORCH_CHECK(packed.dim() == 5 && packed.is_contiguous() && packed.size(4) == kStemBlock,
                "packed: expected what stem_prepack returns, got ", packed.sizes());
    Stem q{x.size(2), x.size(3), x.size(1), 0, 0, packed.size(0) * kStemBlock, {packed.size(1), packed.size(2)},
           {stride[0], stride[1]}, {padding[0], padding[1]}, packed.data_ptr()};
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) == packed.size(3),
                "x: expected float32, channels_last, with ", packed.size(3), " channels, got ", x.scalar_type(), " ", x.sizes());
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous() && bias.numel() == q.out_channels, "bias: expected ",
                q.out_channels, " float32 values");
    TORCH_CHECK(pool_kernel[0] <= kStemWindow, "pool_kernel: expected at most ", kStemWindow, " rows, got ", pool_kernel[0]);
    q.out_height = (q.height + 2 * padding[0] - q.kernel[0]) / stride[0] + 1;
    q.out_width = (q.width + 2 * padding[1] - q.kernel[1]) / stride[1] + 1;
    Pool pool{q.out_height, q.out_width,
              (q.out_height + 2 * pool_padding[0] - pool_kernel[0]) / pool_stride[0] + 1,
              (q.out_width + 2 * pool_padding[1] - pool_kernel[1]) / pool_stride[1] + 1,
              {pool_kernel[0], pool_kernel[1]}, {pool_stride[0], pool_stride[1]}, {pool_padding[0], pool_padding[1]}, nullptr};
    const Tensor out = at::empty({x.size(0), q.out_channels, pool.out_height, pool.out_width},
                                 x.options().memory_format(at::MemoryFormat::ChannelsLast));
    Args a{};
    a.layout = {q.out_channels, 0};
    a.y_type = a.other_type = DType::f32;
    a.act = act_of(act);
    a.act_param = act_param;
    a.y = x.data_ptr();
    a.norm.shift = bias.data_ptr();
    a.out = out.data_ptr();
    const int64_t rows = x.size(0) * pool.out_height, threads = at::get_num_threads(), part = (rows + threads - 1) / threads;
    const int64_t scratch = q.kernel[0] * (q.width + 2 * padding[1]) * q.channels + pool.kernel[0] * q.out_width * q.out_channels;
    const Tensor all = at::empty({threads, scratch}, at::TensorOptions().dtype(at::kFloat));
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            table().stem(a, q, pool, all.data_ptr<float>() + i * scratch, std::min(rows, i * part), std::min(rows, (i + 1) * part));
    });
    return out;
}

}  // namespace fused_resnet::cpu
