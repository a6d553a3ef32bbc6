// 3x3 convolutions of channels_last tensors by Winograd's algorithm: matrix products between transforms.
#include "args.h"
#include "conv_list.h"
#include "product.h"

namespace fused_resnet::cpu {

namespace {

// With at least this many tiles per thread each thread has its own slices; with at least this many channels the
// algorithm pays.
constexpr int64_t kWinogradTiles = 32;
constexpr int64_t kWinogradChannels = 64;
// A weight's gradient is summed up over slices of tiles: of so many bytes of transforms, and of at least so many tiles,
// for each slice reads and writes (tile + 2)^2 matrices as large as the weight's.
constexpr int64_t kGradientSlice = 8 << 20, kGradientTiles = 256;

// Multiplications in the time of writing a value to memory and reading it: a core of AVX-512 multiplies 58 times a
// nanosecond and moves 20 bytes. A core that does both at half the rate has the same ratio.
constexpr int64_t kMove = 24;

int64_t tiles_along(int64_t size, int tile) { return (size + tile - 1) / tile; }

// What a convolution of so many images to an output of height x width costs in multiplications, with tiles of this
// size: the products, the transforms of input, output and weight.
int64_t cost_of(int tile, int64_t images, int64_t height, int64_t width, int64_t C, int64_t K, bool packed) {
    const int64_t tiles = images * tiles_along(height, tile) * tiles_along(width, tile);
    // Packed weights are only read. Others are read, packed and transformed, in memory that no cache holds.
    return (tile + 2) * (tile + 2) * (tiles * C * K + kMove * (tiles * (C + K) + (packed ? C * K / 2 : 3 * C * K)));
}

// The tiles of a convolution of x to an output of this height and width.
Winograd tiles_of(const Tensor& x, int tile, int64_t out_height, int64_t out_width, int64_t padding) {
    Winograd q{};
    q.tile = tile;
    q.height = x.size(2), q.width = x.size(3), q.out_height = out_height, q.out_width = out_width;
    q.tiles_h = tiles_along(out_height, tile), q.tiles_w = tiles_along(out_width, tile);
    q.padding = padding;
    return q;
}

}  // namespace

// The cheaper size of tiles for a convolution of so many channels to `out`, with weights that change in every step.
int tile_for(const Tensor& out, int64_t channels) {
    const auto cost = [&](int tile) {
        return cost_of(tile, out.size(0), out.size(2), out.size(3), channels, out.size(1), false);
    };
    return cost(4) <= cost(2) ? 4 : 2;
}

// 3x3, stride 1, channels_last, and cheaper than the convolution's own products, of which `rate` take the time of one
// in float. Packed weights have tiles of 4, whatever x is, so that all calls can share them.
bool is_winograd(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                 int64_t groups, bool packed, int64_t rate) {
    const int64_t C = weight.size(1), K = weight.size(0);  // or, for the gradient of an input, turned round
    if (weight.size(2) != 3 || weight.size(3) != 3 || groups != 1 || stride[0] != 1 || stride[1] != 1 ||
        dilation[0] != 1 || dilation[1] != 1 || padding[0] != padding[1] || padding[0] > 2 ||
        std::min(K, C) < kWinogradChannels || x.size(2) < 4 || x.size(3) < 4 ||
        !x.is_contiguous(at::MemoryFormat::ChannelsLast))
        return false;
    const int64_t height = x.size(2) + 2 * padding[0] - 2, width = x.size(3) + 2 * padding[0] - 2;
    const int64_t direct = 9 * x.size(0) * height * width * C * K / rate;
    const auto pays = [&](int tile) { return cost_of(tile, x.size(0), height, width, C, K, packed) < direct; };
    return pays(4) || (!packed && pays(2));
}

// The transformed weights, packed as right operands [(tile + 2)^2, panels, depth, GemmKernel::columns]: of C x K, or,
// for the gradient of the input, of K x C with the kernel turned.
Tensor winograd_weight(const Tensor& weight, bool backward, int tile) {
    const Tensor w = weight.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast);
    const GemmKernel& kernel = table().float_gemm;
    const int64_t K = w.size(0), C = w.size(1), products = (tile + 2) * (tile + 2), width = kernel.columns;
    const int64_t depth = backward ? K : C, columns = backward ? C : K, panels = panels_of(kernel, columns),
                  size = panels * depth * width;
    const Tensor u =
        at::empty({products, panels, depth, width}, w.options().memory_format(at::MemoryFormat::Contiguous));
    const float* from = w.const_data_ptr<float>();
    float* to = u.mutable_data_ptr<float>();
    parallel(0, panels_of(kernel, K), 1, [&](int64_t first, int64_t last) {
        float* const part = scratch(products * width * C);  // of some output channels
        for (int64_t i = first; i < last; i++) {
            const int64_t begin = i * width, count = std::min(width, K - begin);
            table().winograd_weight(tile, from + begin * 9 * C, part, count, C, backward, 0, count);
            for (int64_t p = 0; p < products; p++) {
                const float* product = part + p * count * C;
                if (backward) {
                    kernel.pack({depth, columns, product - begin * C, C, 1, to + p * size}, begin, begin + count, 0,
                                panels);
                } else {
                    kernel.pack({depth, count, product, 1, C, to + p * size + i * depth * width}, 0, depth, 0, 1);
                }
            }
        }
    });
    return u;
}

// out = conv3x3(input as `in` sees it), by products with u = winograd_weight(); what `post` says is applied to the
// result. Each thread takes slices of tiles from the input's transform to the output's; too few tiles, and it takes
// some of the products of all of them, or the weights would be read once per thread.
void winograd(Args in, const Tensor& x, const Tensor& u, Args post, const Tensor& out, int64_t padding) {
    const GemmKernel& kernel = table().float_gemm;
    const int64_t products = u.size(0), panels = u.size(1), C = x.size(1), K = out.size(1);
    Winograd q = tiles_of(x, products == 36 ? 4 : 2, out.size(2), out.size(3), padding);
    const int64_t tiles = x.size(0) * q.tiles_h * q.tiles_w, threads = at::get_num_threads();
    const int64_t takers = tiles >= kWinogradTiles * threads ? threads : 1;
    // tiles whose transforms stay in half of the L2; or so many that the weights are read less often than the
    // transforms
    const int64_t most = std::max(l2_bytes() / 2 / (4 * products * (C + K)), 2 * C * K / (C + K));
    // a multiple of the takers, so that all have the same amount of work
    const int64_t slices = (tiles + most * takers - 1) / (most * takers) * takers,
                  slice = (tiles + slices - 1) / slices;
    q.count = slice;
    const int64_t size = products * (q.matrix(C) + q.matrix(K)), width = kernel.columns;
    const Tensor transforms =
        at::empty({takers, size}, x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
    float* const memory = transforms.mutable_data_ptr<float>();
    const float* weights = u.const_data_ptr<float>();
    parallel(0, takers, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            for (int64_t j = i; j < slices; j += takers) {
                Winograd part = q;
                part.first = j * slice;
                part.count = std::min(slice, tiles - part.first);
                if (part.count <= 0) continue;
                float *const v = memory + i * size, *const m = v + products * q.matrix(C);
                const int64_t end = part.first + part.count;
                // with several takers these loops run in the taker's thread
                parallel(part.first, end, 8, [&](int64_t b, int64_t e) { table().winograd_input(in, part, v, b, e); });
                parallel(0, products * panels, std::max<int64_t>(1, panels / 2), [&](int64_t b, int64_t e) {
                    for (int64_t p = b / panels; p * panels < e; p++)
                        kernel.gemm({part.count, K, C, v + p * part.matrix(C), C, 1, weights + p * panels * C * width,
                                     m + p * part.matrix(K), K, false},
                                    gemm_scratch(), 0, part.count, std::max<int64_t>(0, b - p * panels),
                                    std::min(panels, e - p * panels));
                });
                parallel(part.first, end, 8,
                         [&](int64_t b, int64_t e) { table().winograd_output(post, part, m, b, e); });
            }
    });
}

// The gradient [K, C, 3, 3] of the weight of out = conv3x3(input as `in` sees it), from dy, in float: the sum over
// tiles of G' [(A dy A') (B' input B)] G, the products by channels. All threads take each step together.
Tensor winograd_backward_weight(Args in, const Tensor& x, const Tensor& dy, int64_t padding) {
    const GemmKernel& kernel = table().float_gemm;
    const int64_t C = x.size(1), K = dy.size(1), width = kernel.columns, panels = panels_of(kernel, C);
    Winograd q = tiles_of(x, tile_for(dy, C), dy.size(2), dy.size(3), padding);
    const int64_t products = (q.tile + 2) * (q.tile + 2), tiles = x.size(0) * q.tiles_h * q.tiles_w;
    const int64_t most = std::max(kGradientTiles, kGradientSlice / (4 * products * (C + K + panels * width)));
    const int64_t slices = (tiles + most - 1) / most, slice = (tiles + slices - 1) / slices;
    const auto options = dy.options().memory_format(at::MemoryFormat::Contiguous);
    const Tensor u = at::empty({products, K, C}, options),
                 packed = at::empty({products, panels, slice, width}, options);
    q.count = slice;
    const Tensor v = at::empty({products, q.matrix(C)}, options), e = at::empty({products, q.matrix(K)}, options);
    float *const v_data = v.mutable_data_ptr<float>(), *const e_data = e.mutable_data_ptr<float>();
    float *const b_data = packed.mutable_data_ptr<float>(), *const u_data = u.mutable_data_ptr<float>();
    const float* const dy_data = dy.const_data_ptr<float>();
    // parts of the rows of each product, so that all threads have some
    const int64_t height = kernel.rows, rows = (K + height - 1) / height;
    const int64_t parts = std::min(rows, 1 + (2 * at::get_num_threads() - 1) / products);
    for (q.first = 0; q.first < tiles; q.first += slice) {
        q.count = std::min(slice, tiles - q.first);
        const int64_t n = q.count, end = q.first + n;
        parallel(q.first, end, 8, [&](int64_t b, int64_t t) {
            table().winograd_input(in, q, v_data, b, t);
            table().winograd_output_gradient(dy_data, q, e_data, K, b, t);
        });
        parallel(0, products, 1, [&](int64_t b, int64_t t) {
            for (int64_t p = b; p < t; p++)
                kernel.pack({n, C, v_data + p * q.matrix(C), C, 1, b_data + p * panels * n * width}, 0, n, 0, panels);
        });
        parallel(0, products * parts, 1, [&](int64_t b, int64_t t) {
            for (int64_t i = b; i < t; i++) {
                const int64_t p = i / parts, part = i % parts;
                kernel.gemm({K, C, n, e_data + p * q.matrix(K), 1, K, b_data + p * panels * n * width,
                             u_data + p * K * C, C, q.first > 0},
                            gemm_scratch(), rows * part / parts * height,
                            std::min(K, rows * (part + 1) / parts * height), 0, panels);
            }
        });
    }
    const Tensor dw = at::empty({K, C, 3, 3}, options.memory_format(at::MemoryFormat::ChannelsLast));
    float* const dw_data = dw.mutable_data_ptr<float>();
    parallel(0, K, 4,
             [&](int64_t b, int64_t t) { table().winograd_weight_gradient(q.tile, u_data, dw_data, K, C, b, t); });
    return dw;
}

// The output tensor of a 3x3 convolution of x at stride 1.
Tensor winograd_output(const Tensor& x, int64_t channels, int64_t padding) {
    return at::empty({x.size(0), channels, x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2},
                     x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

int64_t winograd_tile(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups) {
    return is_winograd(x, weight, stride, padding, dilation, groups, true, 1) ? 4 : 0;
}

Tensor winograd_prepack(const Tensor& weight, int64_t tile) {
    TORCH_CHECK(tile == 2 || tile == 4, "tile: expected 2 or 4, got ", tile);
    return winograd_weight(weight, false, int(tile));
}

Tensor winograd_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t padding, int64_t act,
                         double act_param, const OptTensor& residual) {
    const GemmKernel& kernel = table().float_gemm;
    TORCH_CHECK(packed.dim() == 4 && (packed.size(0) == 16 || packed.size(0) == 36) &&
                    packed.size(3) == kernel.columns && packed.scalar_type() == at::kFloat && packed.is_contiguous(),
                "packed: expected what winograd_prepack returns, got ", packed.sizes());
    const int64_t C = packed.size(2), K = bias.numel();
    TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) == C, "x: expected channels_last with ", C,
                " channels, got ", x.sizes());
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous() && panels_of(kernel, K) == packed.size(1),
                "bias: expected float32 values of as many channels as were packed, got ", bias.sizes());
    const Tensor y = winograd_output(x, K, padding);
    Args post = epilogue_args(y, act, act_param, residual);
    post.norm.shift = bias.data_ptr();
    winograd(raw_args(x), x, packed, post, y, padding);
    return y;
}

}  // namespace fused_resnet::cpu
