// Squeeze-and-excitation for inference, and the mean of each channel.
#include "arena.h"
#include "args.h"
#include "ops.h"

namespace fused_resnet::cpu {

namespace {

// Rows of an image whose sums are added up first, whatever the number of threads: the bits depend on the shape alone.
constexpr int64_t kSumRows = 64;

// The sums of an image's channels. First those of chunks of rows, then of the chunks.
struct ChannelSums {
    const void* x;
    DType type;
    int64_t channels, rows;

    static int64_t chunks(int64_t rows) { return (rows + kSumRows - 1) / kSumRows; }

    // Of chunks [first, last), to partial [chunks, channels].
    void of_chunks(float* partial, int64_t first, int64_t last) const {
        for (int64_t i = first; i < last; i++)
            table().channel_sums(x, type, channels, partial + i * channels, i * kSumRows,
                                 std::min(rows, (i + 1) * kSumRows));
    }
    void means(const float* partial, float* out) const {
        table().channel_sums(partial, DType::f32, channels, out, 0, chunks(rows));
        for (int64_t c = 0; c < channels; c++) out[c] /= float(rows);
    }
};

struct Layer {
    const float *weight, *bias;
    int64_t outputs, inputs;
    Act act;
    double act_param;

    Layer(const char* name, const Tensor& weight, const Tensor& bias, int64_t outputs, int64_t inputs, int64_t act,
          double act_param)
        : weight(static_cast<const float*>(weight.data_ptr())),
          bias(static_cast<const float*>(bias.data_ptr())),
          outputs(outputs),
          inputs(inputs),
          act(act_of(act)),
          act_param(act_param) {
        FR_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous() && weight.dim() == 2 &&
                     weight.size(0) == outputs && weight.size(1) == inputs,
                 name, ": expected float32 [", outputs, ", ", inputs, "], got ", weight.scalar_type(), " ",
                 weight.sizes());
        FR_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == outputs, name,
                 "'s bias: expected ", outputs, " float32 values, got ", bias.sizes());
    }

    void operator()(const float* x, float* out) const {
        Args a{};
        a.layout = rows_layout(inputs);
        a.act = act, a.act_param = act_param;
        a.y = x, a.out = out, a.norm.shift = bias;
        table().linear(a, weight, 0, outputs);
    }
};

}  // namespace

void excite(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t act, double act_param,
            const Tensor& gate_weight, const Tensor& gate_bias, int64_t gate, double gate_param) {
    check_images(x, x.size(1));
    FR_CHECK(weight.dim() == 2, "weight: expected [S, C], got ", weight.sizes());
    const int64_t C = x.size(1), S = weight.size(0), images = x.size(0), rows = x.size(2) * x.size(3);
    const Layer squeeze("weight", weight, bias, S, C, act, act_param);
    const Layer expand("gate_weight", gate_weight, gate_bias, C, S, gate, gate_param);
    const int64_t chunks = ChannelSums::chunks(rows), size = (chunks + 1) * C + S;
    const Memory memory(images * size * sizeof(float));
    const DType type = dtype_of(x.scalar_type());
    char* const data = bytes(x);
    const int64_t image_bytes = rows * C * x.element_size();
    const auto sums_of = [&](int64_t image) { return ChannelSums{data + image * image_bytes, type, C, rows}; };
    const auto sum = [&](int64_t image, int64_t first, int64_t last) {
        sums_of(image).of_chunks(memory.at<float>() + image * size, first, last);
    };
    const auto factors = [&](int64_t image) {  // over the sums
        float *const sums = memory.at<float>() + image * size, *const mean = sums + chunks * C,
                     *const hidden = mean + C;
        sums_of(image).means(sums, mean);
        squeeze(mean, hidden);
        expand(hidden, mean);
        return mean;
    };
    const auto scale = [&](int64_t image, const float* by, int64_t first, int64_t last) {
        table().scale_rows(data + image * image_bytes, type, C, by, first, last);
    };
    if (images >= thread_count()) {
        parallel(0, images, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                sum(i, 0, chunks);
                scale(i, factors(i), 0, rows);
            }
        });
        return;
    }
    for (int64_t i = 0; i < images; i++) {
        parallel(0, chunks, 1, [&](int64_t begin, int64_t end) { sum(i, begin, end); });
        const float* const by = factors(i);
        parallel(0, rows, kSumRows, [&](int64_t begin, int64_t end) { scale(i, by, begin, end); });
    }
}

Tensor channel_means(const Tensor& x) {
    check_images(x, x.size(1));
    const DType type = dtype_of(x.scalar_type());
    const int64_t C = x.size(1), rows = x.size(2) * x.size(3), chunks = ChannelSums::chunks(rows);
    const Tensor out = result({x.size(0), C, 1, 1}, x.options());
    const int64_t size = (chunks + 1) * C;
    const Memory memory(x.size(0) * size * sizeof(float));
    const char* const from = bytes(x);
    char* const to = bytes(out);
    const int64_t image_bytes = rows * C * x.element_size(), mean_bytes = C * x.element_size();
    Args round{};  // the means, to x's dtype
    round.layout = rows_layout(C);
    round.y_type = DType::f32;
    round.other_type = type;
    parallel(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const ChannelSums sums{from + i * image_bytes, type, C, rows};
            float *const partials = memory.at<float>() + i * size, *const means = partials + chunks * C;
            sums.of_chunks(partials, 0, chunks);
            sums.means(partials, means);
            Args mine = round;
            mine.y = means;
            mine.out = to + i * mean_bytes;
            table().convert(mine, 0, 1);
        }
    });
    return out;
}

}  // namespace fused_resnet::cpu
