// 3x3 convolutions of channels_last tensors by Winograd's algorithm: matrix products between transforms.
#include "arena.h"
#include "args.h"
#include "conv_list.h"
#include "product.h"

namespace fused_resnet::cpu {

namespace {

// With at least this many tiles per thread each thread has its own slices; with at least this many channels the
// algorithm pays.
constexpr int64_t kWinogradTiles = 32;
constexpr int64_t kWinogradChannels = 64;
// With at most this many tiles the transformed input is read again in less time than transformed weights would be
// written and read.
constexpr int64_t kPanelTiles = 256;
// A weight's gradient is summed up over slices of tiles: of so many bytes of transforms, and of at least so many tiles,
// for each slice reads and writes (tile + 2)^2 matrices as large as the weight's.
constexpr int64_t kGradientSlice = 8 << 20, kGradientTiles = 256;

// Multiplications in the time of writing a value to memory and reading it: a core of AVX-512 multiplies 58 times a
// nanosecond and moves 23 bytes. A core that does both at half the rate has the same ratio.
constexpr int64_t kMove = 20;

int64_t tiles_along(int64_t size, int tile) { return (size + tile - 1) / tile; }

// What a convolution of so many images to an output of height x width costs in multiplications, with tiles of this
// size: the products, the transforms of input, output and weight.
int64_t cost_of(int tile, int64_t images, int64_t height, int64_t width, int64_t C, int64_t K, bool packed) {
    const int64_t tiles = images * tiles_along(height, tile) * tiles_along(width, tile), weights = C * K;
    // Packed weights are only read. Others are transformed, then written and read, or the input is read more often.
    const int64_t moved = packed ? weights / 2 : weights + 2 * weights * std::min(tiles, kPanelTiles) / kPanelTiles;
    return (tile + 2) * (tile + 2) * (tiles * weights + kMove * (tiles * (C + K) + moved));
}

// All tiles of a convolution of x to `out`.
Winograd tiles_of(const Tensor& x, int tile, const Tensor& out, int64_t padding) {
    Winograd q{};
    q.tile = tile;
    q.height = x.size(2), q.width = x.size(3), q.out_height = out.size(2), q.out_width = out.size(3);
    q.tiles_h = tiles_along(q.out_height, tile), q.tiles_w = tiles_along(q.out_width, tile);
    q.padding = padding;
    q.out_row = out.size(1);
    q.count = x.size(0) * q.tiles_h * q.tiles_w;
    return q;
}

// The Args of channels [first, first + count) of a result.
Args channels_from(Args post, int64_t first, int64_t count, const Tensor& out) {
    const auto from = [first](const void* p, int64_t size) {
        return p ? static_cast<const char*>(p) + first * size : nullptr;
    };
    post.layout.channels = count;
    post.out = static_cast<char*>(post.out) + first * out.element_size();
    post.residual = from(post.residual, out.element_size());
    post.norm.scale = from(post.norm.scale, sizeof(float)), post.norm.shift = from(post.norm.shift, sizeof(float));
    return post;
}

// The cheaper size of tiles for a convolution of so many channels to `out`, with weights that change in every step.
int tile_for(const Tensor& out, int64_t channels) {
    const auto cost = [&](int tile) {
        return cost_of(tile, out.size(0), out.size(2), out.size(3), channels, out.size(1), false);
    };
    return cost(4) <= cost(2) ? 4 : 2;
}

// 3x3, stride 1, channels_last.
bool suits(const Image& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation, int64_t groups) {
    return weight.size(2) == 3 && weight.size(3) == 3 && groups == 1 && stride[0] == 1 && stride[1] == 1 &&
           dilation[0] == 1 && dilation[1] == 1 && padding[0] == padding[1] && padding[0] <= 2 && x.height >= 4 &&
           x.width >= 4 && x.rows;
}

}  // namespace

// Cheaper than the convolution's own products, of which `rate` take the time of one in float. Packed weights have tiles
// of 4, whatever x is, so that all calls can share them.
bool is_winograd(const Image& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                 int64_t groups, bool packed, int64_t rate) {
    const int64_t C = weight.size(1), K = weight.size(0);  // or, for the gradient of an input, turned round
    if (std::min(K, C) < kWinogradChannels || !suits(x, weight, stride, padding, dilation, groups)) return false;
    const int64_t height = x.height + 2 * padding[0] - 2, width = x.width + 2 * padding[0] - 2;
    const int64_t direct = 9 * x.count * height * width * C * K / rate;
    const auto pays = [&](int tile) { return cost_of(tile, x.count, height, width, C, K, packed) < direct; };
    return pays(4) || (!packed && pays(2));
}

namespace {

// Weights [K, C, 3, 3] as right operands of products, C x K, or, for the gradient of the input, K x C with the kernel
// turned: transformed panel by panel.
class Weights {
    const Tensor w;
    const GemmKernel& kernel = table().float_gemm;
    const int tile;
    const bool backward;

    // Output channels whose transforms are made before they are packed: so many inputs that they stay in L2.
    static constexpr int64_t kInputs = 64;

  public:
    const int64_t products, depth, columns;

    Weights(const Tensor& weight, bool backward, int tile)
        : w(weight.to(ScalarType::Float).contiguous(kRows)),
          tile(tile),
          backward(backward),
          products((tile + 2) * (tile + 2)),
          depth(w.size(backward ? 0 : 1)),
          columns(w.size(backward ? 1 : 0)) {}
    // Floats of scratch that panel() takes.
    int64_t scratch_size() const { return backward ? 0 : products * kernel.columns * kInputs; }
    // Panel i of each product, `matrix` values apart.
    void panel(int64_t i, float* to, int64_t matrix, float* part) const {
        const int64_t width = kernel.columns, first = i * width, count = std::min(width, columns - first);
        const float* const from = static_cast<const float*>(w.data_ptr());
        if (backward)
            return table().winograd_weight({tile, from + first, columns, count, to, matrix, width, true}, 0, depth);
        for (int64_t c = 0; c < depth; c += kInputs) {
            const int64_t inputs = std::min(kInputs, depth - c), size = count * kInputs;
            table().winograd_weight({tile, from + first * 9 * depth + c, depth, inputs, part, size, kInputs, false}, 0,
                                    count);
            for (int64_t p = 0; p < products; p++)
                kernel.pack({inputs, count, part + p * size, 1, kInputs, to + p * matrix + c * width}, 0, inputs, 0, 1);
        }
    }
    // All panels: [products, panels, depth, GemmKernel::columns].
    Tensor all() const {
        const int64_t panels = panels_of(kernel, columns), size = depth * kernel.columns;
        const Tensor u = empty({products, panels, depth, kernel.columns}, w.options());
        float* const to = static_cast<float*>(u.data_ptr());
        parallel(0, panels, 1, [&](int64_t b, int64_t e) {
            float* const part = scratch(scratch_size());
            for (int64_t i = b; i < e; i++) panel(i, to + i * size, panels * size, part);
        });
        return u;
    }
};

// out = conv3x3(input as `in` sees it), by products with u = Weights::all(); what `post` says is applied to the
// result. Each thread takes slices of tiles from the input's transform to the output's; too few tiles, and it takes
// some of the products of all of them, or the weights would be read once per thread.
void by_slices(const Args& in, const Tensor& x, const Tensor& u, const Args& post, const Tensor& out, Winograd q) {
    const GemmKernel& kernel = table().float_gemm;
    const int64_t products = u.size(0), panels = u.size(1), C = x.size(1), K = out.size(1);
    const int64_t tiles = q.count, threads = thread_count();
    const int64_t takers = tiles >= kWinogradTiles * threads ? threads : 1;
    // tiles whose transforms stay in half of the L2; or so many that the weights are read less often than the
    // transforms
    const int64_t most = std::max(l2_bytes() / 2 / (4 * products * (C + K)), 2 * C * K / (C + K));
    // a multiple of the takers, so that all have the same amount of work
    const int64_t slices = (tiles + most * takers - 1) / (most * takers) * takers,
                  slice = (tiles + slices - 1) / slices;
    q.count = slice;
    const int64_t size = products * (q.matrix(C) + q.matrix(K)), width = kernel.columns;
    const Memory transforms(takers * size * sizeof(float));
    float* const memory = transforms.at<float>();
    const float* weights = static_cast<const float*>(u.data_ptr());
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

// The same with weights that are transformed for this call. Each thread takes panels of output channels, from the
// weight's transform to the output's, so that transformed weights never leave its cache; the transformed input is read
// once per panel.
void by_panels(const Args& in, const Tensor& x, const Weights& weights, const Args& post, const Tensor& out,
               const Winograd& q) {
    const GemmKernel& kernel = table().float_gemm;
    const int64_t products = weights.products, C = x.size(1), K = out.size(1), width = kernel.columns;
    const Memory transforms(products * q.matrix(C) * sizeof(float));
    float* const v = transforms.at<float>();
    parallel(0, q.count, 8, [&](int64_t b, int64_t e) { table().winograd_input(in, q, v, b, e); });
    parallel(0, panels_of(kernel, K), 1, [&](int64_t first, int64_t last) {
        const int64_t matrix = odd_lines(C * width);
        float *const u = scratch(products * (matrix + q.matrix(width)) + weights.scratch_size()),
                     *const m = u + products * matrix, *const part = m + products * q.matrix(width);
        for (int64_t i = first; i < last; i++) {
            const int64_t channel = i * width, count = std::min(width, K - channel);
            weights.panel(i, u, matrix, part);
            for (int64_t p = 0; p < products; p++)
                kernel.gemm({q.count, count, C, v + p * q.matrix(C), C, 1, u + p * matrix, m + p * q.matrix(count),
                             count, false},
                            gemm_scratch(), 0, q.count, 0, 1);
            table().winograd_output(channels_from(post, channel, count, out), q, m, 0, q.count);
        }
    });
}

}  // namespace

void winograd(const Args& in, const Tensor& x, const Tensor& weight, bool backward, const Args& post, const Tensor& out,
              int64_t padding) {
    const int tile = tile_for(out, x.size(1));
    const Winograd q = tiles_of(x, tile, out, padding);
    const Weights weights(weight, backward, tile);
    if (q.count <= kPanelTiles && panels_of(table().float_gemm, out.size(1)) >= thread_count())
        return by_panels(in, x, weights, post, out, q);
    by_slices(in, x, weights.all(), post, out, q);
}

// The gradient [K, C, 3, 3] of the weight of out = conv3x3(input as `in` sees it), from dy, in float: the sum over
// tiles of G' [(A dy A') (B' input B)] G, the products by channels. All threads take each step together.
Tensor winograd_backward_weight(Args in, const Tensor& x, const Tensor& dy, int64_t padding) {
    const GemmKernel& kernel = table().float_gemm;
    const int64_t C = x.size(1), K = dy.size(1), width = kernel.columns, panels = panels_of(kernel, C);
    Winograd q = tiles_of(x, tile_for(dy, C), dy, padding);
    const int64_t products = (q.tile + 2) * (q.tile + 2), tiles = q.count;
    const int64_t most = std::max(kGradientTiles, kGradientSlice / (4 * products * (C + K + panels * width)));
    const int64_t slices = (tiles + most - 1) / most, slice = (tiles + slices - 1) / slices;
    const Memory packed(products * panels * slice * width * sizeof(float));
    q.count = slice;
    const Memory v(products * q.matrix(C) * sizeof(float)), e(products * q.matrix(K) * sizeof(float));
    const Tensor dw = empty({K, C, 3, 3}, dy.options(), kRows);
    float *const v_data = v.at<float>(), *const e_data = e.at<float>();
    float *const b_data = packed.at<float>(), *const dw_data = static_cast<float*>(dw.data_ptr());
    const float* const dy_data = static_cast<const float*>(dy.data_ptr());
    const int64_t height = kernel.rows, rows = (K + height - 1) / height;
    // product p of rows [begin, end), to `to` as if all rows were there
    const auto multiply = [&](int64_t p, int64_t begin, int64_t end, float* to) {
        kernel.gemm(
            {K, C, q.count, e_data + p * q.matrix(K), 1, K, b_data + p * panels * q.count * width, to, C, q.first > 0},
            gemm_scratch(), begin, std::min(K, end), 0, panels);
    };
    // With one slice, blocks of rows go from the products to the result while they are in L2, if all threads have some.
    const int64_t block = height * std::max<int64_t>(1, l2_bytes() / (4 * products * height * C)),
                  blocks = (K + block - 1) / block;
    const bool at_once = slices == 1 && blocks >= thread_count();
    const Memory u(at_once ? 0 : products * K * C * sizeof(float));
    float* const u_data = u.at<float>();
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
        if (at_once) break;
        // parts of the rows of each product, so that all threads have some
        const int64_t parts = std::min(rows, 1 + (2 * thread_count() - 1) / products);
        parallel(0, products * parts, 1, [&](int64_t b, int64_t t) {
            for (int64_t i = b; i < t; i++) {
                const int64_t p = i / parts, part = i % parts;
                multiply(p, rows * part / parts * height, rows * (part + 1) / parts * height, u_data + p * K * C);
            }
        });
    }
    parallel(0, blocks, 1, [&](int64_t b, int64_t t) {
        float* const part = at_once ? scratch(products * block * C) : nullptr;
        for (int64_t i = b; i < t; i++) {
            const int64_t begin = i * block, count = std::min(block, K - begin);
            for (int64_t p = 0; at_once && p < products; p++)
                multiply(p, begin, begin + count, part + (p * count - begin) * C);
            const float* const from = at_once ? part : u_data + begin * C;
            table().winograd_weight_gradient(q.tile, from, (at_once ? count : K) * C, dw_data + begin * 9 * C, C, 0,
                                             count);
        }
    });
    return dw;
}

// The output tensor of a 3x3 convolution of x at stride 1.
Tensor winograd_output(const Tensor& x, int64_t channels, int64_t padding) {
    return result({x.size(0), channels, x.size(2) + 2 * padding - 2, x.size(3) + 2 * padding - 2}, x.options());
}

bool winograd_suits(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                    int64_t groups) {
    return suits(Image(x), weight, stride, padding, dilation, groups);
}

int64_t winograd_tile(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups) {
    return is_winograd(Image(x), weight, stride, padding, dilation, groups, true, 1) ? 4 : 0;
}

Tensor winograd_prepack(const Tensor& weight, int64_t tile) {
    FR_CHECK(tile == 2 || tile == 4, "tile: expected 2 or 4, got ", tile);
    return Weights(weight, false, int(tile)).all();
}

Tensor winograd_bias_act(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t padding, int64_t act,
                         double act_param, const OptTensor& residual) {
    const GemmKernel& kernel = table().float_gemm;
    FR_CHECK(packed.dim() == 4 && (packed.size(0) == 16 || packed.size(0) == 36) && packed.size(3) == kernel.columns &&
                 packed.scalar_type() == ScalarType::Float && packed.is_contiguous(),
             "packed: expected what winograd_prepack returns, got ", packed.sizes());
    const int64_t C = packed.size(2), K = bias.numel();
    FR_CHECK(x.is_channels_last() && x.size(1) == C, "x: expected channels_last with ", C, " channels, got ",
             x.sizes());
    FR_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && panels_of(kernel, K) == packed.size(1),
             "bias: expected float32 values of as many channels as were packed, got ", bias.sizes());
    const Tensor y = winograd_output(x, K, padding);
    Args post = epilogue_args(y, act, act_param, residual);
    post.norm.shift = bias.data_ptr();
    by_slices(raw_args(x), x, packed, post, y, tiles_of(x, packed.size(0) == 36 ? 4 : 2, y, padding));
    return y;
}

}  // namespace fused_resnet::cpu
