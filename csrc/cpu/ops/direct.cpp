// Our own convolutions for inference: the stem with its max-pool, and 1x1 with bias, residual and activation.
#include "launch.h"
#include "ops.h"

namespace fused_resnet::cpu {

namespace {

bool direct_suits(const Tensor& x, const Tensor& weight, int64_t groups) {
    return x.scalar_type() == ScalarType::Float && x.is_channels_last() && weight.size(0) % kDirectBlock == 0 &&
           groups == 1;
}

void check_packed(const Tensor& packed, const Tensor& x, const Tensor& bias) {
    FR_CHECK(packed.dim() == 5 && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                 packed.size(4) == kDirectBlock,
             "packed: expected what direct_prepack returns, got ", packed.sizes());
    FR_CHECK(x.scalar_type() == ScalarType::Float && x.is_channels_last() && x.size(1) == packed.size(3),
             "x: expected float32, channels_last, with ", packed.size(3), " channels, got ", x.scalar_type(), " ",
             x.sizes());
    FR_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() &&
                 bias.numel() == packed.size(0) * kDirectBlock,
             "bias: expected ", packed.size(0) * kDirectBlock, " float32 values");
}

Args direct_args(const Tensor& x, const Tensor& bias, int64_t act, double act_param, const Tensor& out) {
    Args a{};
    a.layout = {out.size(1), 0};
    a.y_type = a.other_type = DType::f32;
    a.act = act_of(act);
    a.act_param = act_param;
    a.y = x.data_ptr();
    a.norm.shift = bias.data_ptr();
    a.out = out.data_ptr();
    return a;
}

}  // namespace

bool stem_suits(const Tensor& x, const Tensor& weight, IntList dilation, int64_t groups, IntList pool_kernel) {
    return direct_suits(x, weight, groups) && x.size(1) <= 4 && dilation[0] == 1 && dilation[1] == 1 &&
           pool_kernel[0] <= kPoolRows;
}

bool pointwise_suits(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, int64_t groups) {
    // more outputs than inputs: oneDNN is as fast where there is less to store; and more inputs would leave the first
    // cache. With 16 registers the sums are of too few pixels per weight that is loaded: oneDNN's is faster by a tenth
    // to a fifth.
    return table().registers >= 32 && direct_suits(x, weight, groups) && weight.size(2) == 1 && weight.size(3) == 1 &&
           stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0 && weight.size(0) > weight.size(1) &&
           weight.size(1) <= 512;
}

Tensor direct_prepack(const Tensor& weight) {
    const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
    FR_CHECK(weight.scalar_type() == ScalarType::Float && K % kDirectBlock == 0,
             "weight: expected float32 and a multiple of ", kDirectBlock, " output channels, got ",
             weight.scalar_type(), " and ", K);
    const IntList s = weight.strides();
    return weight.view({K / kDirectBlock, R, S, C, kDirectBlock}, {kDirectBlock * s[0], s[2], s[3], s[1], s[0]})
        .contiguous();
}

Tensor stem_bias_act_max_pool(const Tensor& x, const Tensor& packed, const Tensor& bias, IntList stride,
                              IntList padding, int64_t act, double act_param, IntList pool_kernel, IntList pool_stride,
                              IntList pool_padding) {
    check_packed(packed, x, bias);
    Direct q{x.size(2),
             x.size(3),
             x.size(1),
             0,
             0,
             packed.size(0) * kDirectBlock,
             {packed.size(1), packed.size(2)},
             {stride[0], stride[1]},
             {padding[0], padding[1]},
             packed.data_ptr()};
    FR_CHECK(pool_kernel[0] <= kPoolRows, "pool_kernel: expected at most ", kPoolRows, " rows, got ", pool_kernel[0]);
    q.out_height = (q.height + 2 * padding[0] - q.kernel[0]) / stride[0] + 1;
    q.out_width = (q.width + 2 * padding[1] - q.kernel[1]) / stride[1] + 1;
    Pool pool{q.out_height,
              q.out_width,
              (q.out_height + 2 * pool_padding[0] - pool_kernel[0]) / pool_stride[0] + 1,
              (q.out_width + 2 * pool_padding[1] - pool_kernel[1]) / pool_stride[1] + 1,
              {pool_kernel[0], pool_kernel[1]},
              {pool_stride[0], pool_stride[1]},
              {pool_padding[0], pool_padding[1]},
              nullptr};
    const Tensor out = empty({x.size(0), q.out_channels, pool.out_height, pool.out_width}, x.options(), kRows);
    const Args a = direct_args(x, bias, act, act_param, out);
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

void pointwise_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t act, double act_param,
                        const OptTensor& residual, const Tensor& out) {
    check_packed(packed, x, bias);
    FR_CHECK(packed.size(1) == 1 && packed.size(2) == 1, "packed: expected a 1x1 weight, got ", packed.sizes());
    const auto check = [&](const char* name, const Tensor& t) {
        FR_CHECK(t.scalar_type() == ScalarType::Float && t.is_channels_last() && t.size(0) == x.size(0) &&
                     t.size(1) == bias.numel() && t.size(2) == x.size(2) && t.size(3) == x.size(3),
                 name, ": expected the convolution's result, float32, channels_last, got ", t.scalar_type(), " ",
                 t.sizes());
    };
    check("out", out);
    Args a = direct_args(x, bias, act, act_param, out);
    if (residual) {
        check("residual", *residual);
        a.residual = residual->data_ptr();
    }
    Direct q{};
    q.kernel[0] = q.kernel[1] = 1;
    q.channels = x.size(1), q.out_channels = out.size(1), q.weight = packed.data_ptr();
    parallel(0, x.numel() / q.channels, 28, [&](int64_t first, int64_t last) { table().pointwise(a, q, first, last); });
}

}  // namespace fused_resnet::cpu
