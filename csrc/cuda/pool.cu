// The stem's tail: normalise + act + max-pool in one pass, and its backward as a gather.
#include "../pool_math.h"
#include "tile.cuh"

namespace fused_resnet::cuda {

namespace {

// Blocks per multiprocessor. A pixel's windows keep enough loads in flight.
constexpr int kResident = 6, kBackwardResident = 4;

// Calls body(n, h, w, pixel) for the pixels of this block's rows of images. A row's columns are spread over
// threadIdx.y, so that values which depend only on the row are computed once per row.
template <class Row, class Body>
__device__ __forceinline__ void pixels(int images, int height, int width, int64_t each, Row row, Body body) {
    const int64_t first = blockIdx.y * each, all = int64_t(images) * height,
                  end = all < first + each ? all : first + each;
    // ops.cpp checks that the number of rows of images fits into 32 bits
    for (unsigned at = unsigned(first); at < unsigned(end); at++) {
        const int64_t n = at / unsigned(height);
        const auto about = row(int(at % unsigned(height)));
        for (int w = threadIdx.y; w < width; w += blockDim.y) body(n, about, w, int64_t(at) * width + w);
    }
}

// out = max over (i, j) of act(s y + t), argmax = i * width of the window + j of the first maximum. A NaN wins, padding
// never.
// Tile: TX groups of channels (tile.cuh) x whole rows of outputs. Traffic: y read once from memory (overlapping windows
// meet in L1 and L2), out and one byte per output written. Source: the comparison is that of ATen's max_pool2d.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, resident<T>(kResident))
    bn_act_max_pool_kernel(const Pass a, const Pool q, const int64_t each) {
    using A = Wide<T>;
    const int64_t c = first_channel<V>();
    if (c >= a.channels) return;
    const Lanes<A, V> scale = vector<A, V>(a.norm.scale, c, a.channels),
                      shift = vector<A, V>(a.norm.shift, c, a.channels);
    const T* y = static_cast<const T*>(a.y) + c;
    T* out = static_cast<T*>(a.out) + c;
    pixels(
        q.images, q.out_height, q.out_width, each, [&](int oh) { return oh * q.stride[0] - q.padding[0]; },
        [&](int64_t n, int top, int ow, int64_t pixel) {
            const int left = ow * q.stride[1] - q.padding[1];
            Lanes<A, V> best{};
            int place[V];
#pragma unroll
            for (int k = 0; k < V; k++) place[k] = -1;
            for (int i = top < 0 ? -top : 0; i < q.kernel[0] && top + i < q.height; i++)
                for (int j = left < 0 ? -left : 0; j < q.kernel[1] && left + j < q.width; j++) {
                    const int64_t from = ((n * q.height + top + i) * q.width + left + j) * a.channels;
                    const Lanes<A, V> z = affine(widen<T, V>(fetch<T, V>(y + from)), scale, shift);
                    const Lanes<A, V> v = activate(a.act, z, A(a.act_param));
#pragma unroll
                    for (int k = 0; k < V; k++)
                        // the first pixel wins even if it is -inf
                        if (place[k] < 0 || v[k] > best[k] || v[k] != v[k])
                            best[k] = v[k], place[k] = i * q.kernel[1] + j;
                }
            store<T, V>(out + pixel * a.channels, best);
            unsigned char bytes[V];
#pragma unroll
            for (int k = 0; k < V; k++) bytes[k] = static_cast<unsigned char>(place[k]);
            Word<unsigned char, V> word;
            memcpy(&word, bytes, sizeof(word));
            *reinterpret_cast<Word<unsigned char, V>*>(q.argmax + c + pixel * a.channels) = word;
        });
}

// dz = act'(z) times the sum of grad over the windows whose maximum this pixel is; per block sum dz, sum dz (y - mu).
// Tile: TX groups of channels x whole rows of pixels. A pixel reads the windows that cover it, so nothing is scattered
// and no atomics are needed. Traffic: y read once, grad and argmax read once from memory (a pixel's windows meet in
// L1), dz written once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, resident<T>(kBackwardResident))
    bn_act_max_pool_backward_kernel(const Pass a, const Pool q, const int64_t each) {
    using A = Wide<T>;
    const int64_t c = first_channel<V>();
    Lanes<A, V> total{}, total_y{};
    if (c < a.channels) {
        const Lanes<A, V> scale = vector<A, V>(a.norm.scale, c, a.channels),
                          shift = vector<A, V>(a.norm.shift, c, a.channels);
        const Lanes<A, V> center = vector<A, V>(a.norm.center, c, a.channels);
        const T* y = static_cast<const T*>(a.y) + c;
        const T* grad = static_cast<const T*>(a.grad) + c;
        const uint8_t* argmax = q.argmax + c;
        T* out = static_cast<T*>(a.out) + c;
        struct Row {
            int h;
            Span<int> span;
        };
        pixels(
            q.images, q.height, q.width, each,
            [&](int h) { return Row{h, windows(h, q.kernel[0], q.stride[0], q.padding[0], q.out_height)}; },
            [&](int64_t n, const Row& row, int w, int64_t pixel) {
                const Span<int> columns = windows(w, q.kernel[1], q.stride[1], q.padding[1], q.out_width);
                const Word<T, V> here = fetch<T, V>(y + pixel * a.channels);
                Lanes<A, V> da{};
                for (int oh = row.span.first; oh <= row.span.last; oh++)
                    for (int ow = columns.first; ow <= columns.last; ow++) {
                        const int64_t from = ((n * q.out_height + oh) * q.out_width + ow) * a.channels;
                        const int place = (row.h + q.padding[0] - oh * q.stride[0]) * q.kernel[1] + w + q.padding[1] -
                                          ow * q.stride[1];
                        const Word<unsigned char, V> word = fetch<unsigned char, V>(argmax + from);
                        const Lanes<A, V> g = widen<T, V>(fetch<T, V>(grad + from));
                        unsigned char bytes[V];
                        memcpy(bytes, &word, sizeof(word));
#pragma unroll
                        for (int k = 0; k < V; k++) da[k] += bytes[k] == place ? g[k] : A(0);
                    }
                const Lanes<A, V> value = widen<T, V>(here);
                const Lanes<A, V> dz = activate_backward(a.act, da, affine(value, scale, shift), A(a.act_param));
                store<T, V>(out + pixel * a.channels, dz);
                total = total + dz;
                total_y = total_y + dz * (value - center);
            });
    }
    FR_SHARED(A, shared);
    sum_rows(shared, total, a.partials[0], a.channels);
    sum_rows(shared, total_y, a.partials[1], a.channels);
}

// V bytes of argmax per access too.
int lanes_of(const Pass& a, const Pool& q) {
    const int lanes = cuda::lanes_of(a.dtype, a.channels, {a.y, a.grad, a.out});
    return reinterpret_cast<uintptr_t>(q.argmax) % lanes == 0 ? lanes : 1;
}

// `each` counts rows of images.
Tile tile_of_rows(const Pass& a, int lanes, int64_t rows, int most) {
    Tile tile = tile_of(1, a.channels, lanes, most);
    tile.each = cdiv(rows, blocks_down(tile.grid.x, most));
    tile.grid.y = unsigned(tile.each > 0 ? cdiv(rows, tile.each) : 0);
    return tile;
}

Tile backward_tile(const Pass& a, const Pool& q) {
    return tile_of_rows(a, lanes_of(a, q), int64_t(q.images) * q.height, kBackwardResident);
}

}  // namespace

int64_t bn_act_max_pool_backward_partials(const Pass& a, const Pool& q) { return backward_tile(a, q).grid.y; }

Status bn_act_max_pool(const Pass& a, const Pool& q, Stream stream) {
    const int lanes = lanes_of(a, q);
    const Tile tile = tile_of_rows(a, lanes, int64_t(q.images) * q.out_height, 2 * kResident);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        using T = typename decltype(type)::type;
        return launch(bn_act_max_pool_kernel<T, decltype(v)::value>, tile.grid, tile.threads, 0, stream, a, q,
                      tile.each);
    });
}

Status bn_act_max_pool_backward(const Pass& a, const Pool& q, Stream stream) {
    const int lanes = lanes_of(a, q);
    const Tile tile = backward_tile(a, q);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        using T = typename decltype(type)::type;
        return launch(bn_act_max_pool_backward_kernel<T, decltype(v)::value>, tile.grid, tile.threads,
                      shared_bytes<Wide<T>>(1, lanes), stream, a, q, tile.each);
    });
}

}  // namespace fused_resnet::cuda
