// The stem with its max-pool, for inference.
#include "arena.h"
#include "args.h"
#include "ops.h"
#include "product.h"

namespace fused_resnet::cpu {

bool stem_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups, IntList pool_kernel) {
    return is_row_type(x.scalar_type()) && x.is_channels_last() && weight.size(0) % kStemBlock == 0 && groups == 1 &&
           x.size(1) <= 4 && dilation[0] == 1 && dilation[1] == 1 && pool_kernel[0] <= kPoolRows;
}

Tensor stem_prepack(const Tensor& weight) {
    const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
    FR_CHECK(is_row_type(weight.scalar_type()) && K % kStemBlock == 0,
             "weight: expected float32 or bfloat16 and a multiple of ", kStemBlock, " output channels, got ",
             weight.scalar_type(), " and ", K);
    const IntList s = weight.strides();
    return pack_runs(weight.view({K / kStemBlock, R, S, C, kStemBlock}, {kStemBlock * s[0], s[2], s[3], s[1], s[0]}));
}

Tensor stem_bias_act_max_pool(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride,
                              IntList padding, int64_t act, double act_param, IntList pool_kernel, IntList pool_stride,
                              IntList pool_padding) {
    FR_CHECK(is_packed_runs(packed, x.scalar_type()) && packed.size(4) == kStemBlock,
             "packed: expected what stem_prepack returns, got ", packed.sizes());
    check_images(x, packed.size(3));
    check_bias(bias, packed.size(0) * kStemBlock);
    Stem q{x.size(2),
           x.size(3),
           x.size(1),
           0,
           0,
           packed.size(0) * kStemBlock,
           {packed.size(1), packed.size(2)},
           {stride[0], stride[1]},
           {padding[0], padding[1]},
           packed.data_ptr()};
    FR_CHECK(pool_kernel[0] <= kPoolRows, "pool_kernel: expected at most ", kPoolRows, " rows, got ", pool_kernel[0]);
    q.out_height = output_size(q.height, q.kernel[0], stride[0], padding[0]);
    q.out_width = output_size(q.width, q.kernel[1], stride[1], padding[1]);
    Pool pool{q.out_height,
              q.out_width,
              output_size(q.out_height, pool_kernel[0], pool_stride[0], pool_padding[0]),
              output_size(q.out_width, pool_kernel[1], pool_stride[1], pool_padding[1]),
              {pool_kernel[0], pool_kernel[1]},
              {pool_stride[0], pool_stride[1]},
              {pool_padding[0], pool_padding[1]},
              nullptr};
    const Tensor out = result({x.size(0), q.out_channels, pool.out_height, pool.out_width}, x.options());
    Args a = epilogue_args(out, act, act_param, {});
    a.y = x.data_ptr();
    a.norm.shift = bias.data_ptr();
    const int64_t rows = x.size(0) * pool.out_height, threads = thread_count(), part = (rows + threads - 1) / threads;
    const int64_t scratch =
        q.kernel[0] * (q.width + 2 * padding[1]) * q.channels + pool.kernel[0] * q.out_width * q.out_channels;
    const Memory all(threads * scratch * sizeof(float));
    float* const memory = all.at<float>();
    parallel(0, threads, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            table().stem(a, q, pool, memory + i * scratch, std::min(rows, i * part), std::min(rows, (i + 1) * part));
    });
    return out;
}

}  // namespace fused_resnet::cpu
