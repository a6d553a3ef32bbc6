#include "bands.h"

#include <cstring>

#include "arena.h"
#include "args.h"
#include "product.h"

namespace fused_resnet::cpu {

namespace {

// What a convolution's kernel writes for images of a dtype, without its pointers.
Args args_of(const Packed& by, int64_t channels, ScalarType dtype) {
    check_bias(by.bias, channels);
    Args a{};
    a.layout = rows_layout(channels);
    a.y_type = a.other_type = dtype_of(dtype);
    a.act = act_of(by.act);
    a.act_param = by.act_param;
    a.norm.shift = by.bias.data_ptr();
    return a;
}

// act(conv1x1(.) + bias (+ residual)) of pixels, in the thread that calls it.
class Pointwise {
    const GemmKernel& kernel;
    const Args post;
    const int64_t depth;
    const void* const weight;
    const bool stored;  // whether sums are of the results' type

  public:
    const int64_t channels;

    Pointwise(const Packed& by, int64_t depth, ScalarType dtype)
        : kernel(frozen_kernel(dtype)),
          post(args_of(by, by.bias.numel(), dtype)),
          depth(depth),
          weight(by.weight.data_ptr()),
          stored(dtype == ScalarType::Float),
          channels(by.bias.numel()) {
        check_panels(by.weight, channels, dtype);
        FR_CHECK(by.weight.numel() == panels_of(kernel, channels) * depth * kernel.columns,
                 "weight: expected that of a 1x1 convolution of ", depth, " channels, got ", by.weight.sizes());
    }

    void operator()(const void* x, int64_t pixels, const void* residual, void* out) const {
        Args mine = post;
        const bool onto = stored && residual == out;
        mine.out = out;
        mine.residual = onto ? nullptr : residual;
        Gemm g{pixels,   channels, depth, x, depth, 1, weight, stored ? static_cast<float*>(out) : nullptr,
               channels, onto};
        g.epilogue = &mine;
        const int64_t panels = panels_of(kernel, channels);
        kernel.gemm(g, gemm_scratch(stored ? 0 : kGemmBlock * odd_lines(panels * kernel.columns)), 0, pixels, 0,
                    panels);
    }
};

// The rows of an image [first, last) that are in a buffer, which begins with the first.
class Kept {
    char* const rows;
    const int64_t row;  // bytes
    int64_t image = -1, first = 0, last = 0;

  public:
    Kept(char* rows, int64_t row) : rows(rows), row(row) {}
    // Keeps those of [low, high), and returns the first that is to be made.
    int64_t next(int64_t of, int64_t low, int64_t high) {
        int64_t from = low;
        if (of == image && first <= low && low < last) {
            std::memmove(rows, rows + (low - first) * row, (last - low) * row);
            from = last;
        }
        image = of, first = low, last = high;
        return from;
    }
};

}  // namespace

bool bands_suit(const Tensor& x, int64_t channels) {
    const ScalarType dtype = x.scalar_type();
    if (!is_row_type(dtype) || (dtype == ScalarType::BFloat16 && has_amx_bf16())) return false;
    return x.size(0) * x.size(2) * x.size(3) * channels * x.element_size() > thread_count() * l2_bytes() / 2;
}

Tensor in_bands(const Tensor& x, const Packed& wide, const Packed& depthwise, IntList stride, IntList padding,
                IntList dilation, const Packed* narrow, const OptTensor& residual, bool owned) {
    const ScalarType dtype = x.scalar_type();
    check_images(x, x.size(1));
    const Pointwise expand(wide, x.size(1), dtype);
    const int64_t N = x.size(0), H = x.size(2), W = x.size(3), C = expand.channels, size = x.element_size();
    const IntList kernel = depthwise.weight.sizes();
    FR_CHECK(kernel.size() == 3 && kernel[2] == C && depthwise.weight.scalar_type() == ScalarType::Float,
             "weight: expected [R, S, ", C, "] in float32, got ", kernel);
    const int64_t R = kernel[0], S = kernel[1];
    const Patches whole{nullptr,
                        H,
                        W,
                        C,
                        output_size(H, R, stride[0], padding[0], dilation[0]),
                        output_size(W, S, stride[1], padding[1], dilation[1]),
                        {R, S},
                        {stride[0], stride[1]},
                        {padding[0], padding[1]},
                        {dilation[0], dilation[1]}};
    const Args filter = args_of(depthwise, C, dtype);
    const auto* const weight = static_cast<const float*>(depthwise.weight.data_ptr());
    std::optional<Pointwise> project;
    if (narrow) project.emplace(*narrow, C, dtype);
    const int64_t K = narrow ? project->channels : C, height = whole.out_height, width = whole.out_width;
    const int64_t out_sizes[] = {N, K, height, width};
    FR_CHECK(!residual || (narrow && residual->scalar_type() == dtype && residual->is_channels_last() &&
                           residual->sizes() == IntList(out_sizes)),
             "residual: expected the output's shape, dtype and layout");
    // not in the place of x: a thread still reads the rows beside those that another one has written
    const bool in_place = owned && residual && residual->data_ptr() != x.data_ptr();
    const Tensor out = in_place ? *residual : result(out_sizes, x.options());

    // as many rows as half of a core's cache holds
    const int64_t row = W * C * size, out_row = width * C * size, reach = (R - 1) * dilation[0] + 1;
    const int64_t room = l2_bytes() / 2 - (reach - stride[0]) * row, step = stride[0] * row + (narrow ? out_row : 0);
    const int64_t band = std::max<int64_t>(1, std::min(height, room / step)),
                  high_rows = (band - 1) * stride[0] + reach;
    const int64_t wide_bytes = (std::min(H, high_rows) * row + 63) / 64 * 64,
                  blocks = (C + kDepthwiseBlock - 1) / kDepthwiseBlock;
    const int64_t rows = N * height, threads = thread_count();
    const char *const from = bytes(x), *const summand = residual ? bytes(*residual) : nullptr;
    char* const to = bytes(out);
    parallel(0, threads, 1, [&](int64_t first, int64_t last) {
        char* const wide_rows = reinterpret_cast<char*>(scratch((wide_bytes + (narrow ? band * out_row : 0)) / 4 + 1));
        char* const dw_rows = wide_rows + wide_bytes;
        Kept kept(wide_rows, row);
        const int64_t end = rows * last / threads;
        for (int64_t r = rows * first / threads, count; r < end; r += count) {
            const int64_t image = r / height, h = r % height, top = h * stride[0] - padding[0];
            count = std::min({band, end - r, height - h});
            const int64_t low = std::min(H, std::max<int64_t>(0, top)),
                          high = std::max(low, std::min(H, top + (count - 1) * stride[0] + reach));
            const int64_t begin = kept.next(image, low, high);
            if (begin < high)
                expand(from + (image * H + begin) * W * x.size(1) * size, (high - begin) * W, nullptr,
                       wide_rows + (begin - low) * row);
            Patches part = whole;
            part.x = wide_rows, part.height = high - low, part.out_height = count, part.padding[0] = low - top;
            Args mine = filter;
            mine.out = narrow ? dw_rows : to + r * out_row;
            table().depthwise(mine, part, weight, 0, blocks * count);
            const int64_t at = r * width * K * size;
            if (narrow) (*project)(dw_rows, count* width, summand ? summand + at : nullptr, to + at);
        }
    });
    return out;
}

}  // namespace fused_resnet::cpu
