// Depthwise convolutions, channels_last, for inference: every channel has a kernel of its own. The sums of a tile of
// pixels x channels stay in registers.
#pragma once

#include "direct.h"

namespace {

// Pixels of a tile inside the image, and its vectors of channels: their product is the number of sums in registers. A
// pixel at the border has fewer taps and is a tile of its own, of more channels.
constexpr int kDepthwisePixels = 4, kDepthwiseVectors = FR_REGISTERS >= 32 ? 4 : 2;
// Pixels of a tile whose taps lie side by side, three in a row: each value of x is read once for all pixels that see
// it.
constexpr int kSlidingPixels = 8, kSlidingTaps = 3;
constexpr int kBorderVectors = kDepthwiseBlock / kLanes < 8 ? kDepthwiseBlock / kLanes : 8;

// The taps of a tile: rows [0, rows) and columns [0, columns) of a kernel, from x and w on.
template <class T>
struct Taps {
    const T* x;
    const float* w;
    int64_t rows, columns;
    int64_t x_row, x_column, w_row, w_column;  // values from one tap to the next
};

// P pixels, x apart by `pixel` and out by a.layout.channels, of V vectors of channels from c on, the last of n lanes.
// Slide: the taps from one pixel to the next, if there are kSlidingTaps in a row; 0: as many as there are.
template <int P, int V, int Slide, class T, class N>
FR_INLINE void depthwise_tile(const Args& a, const Taps<T>& t, int64_t pixel, int64_t out, int64_t c, N n) {
    const int64_t C = a.layout.channels;
    const auto each = [&](auto f) __attribute__((always_inline)) {
        unrolled<P>([&](auto i) __attribute__((always_inline)) {
            unrolled<V>([&](auto v) __attribute__((always_inline)) { f(i, v); });
        });
    };
    F32 sum[P][V];
    each([&](auto i, auto v) __attribute__((always_inline)) {
        sum[i][v] = load<F32>(static_cast<const float*>(a.norm.shift) + c + v * kLanes, n);
    });
    const T* x_row = t.x + c;
    const float* w_row = t.w + c;
    for (int64_t r = 0; r < t.rows; r++, x_row += t.x_row, w_row += t.w_row) {
        const T* x = x_row;
        const float* w = w_row;
        if constexpr (Slide > 0) {
            static_assert(V == 1);
            F32 taps[kSlidingTaps];
            unrolled<kSlidingTaps>([&](auto s)
                                       __attribute__((always_inline)) { taps[s] = load<F32>(w + s * t.w_column, n); });
            unrolled<(P - 1) * Slide + kSlidingTaps>([&](auto j) __attribute__((always_inline)) {
                const F32 value = load<F32>(x + j * t.x_column, n);
                unrolled<kSlidingTaps>([&](auto s) __attribute__((always_inline)) {
                    constexpr int i = (j - s) / Slide;
                    if constexpr (j >= s && i < P && (j - s) % Slide == 0) sum[i][0] = sum[i][0] + value * taps[s];
                });
            });
            continue;
        }
        for (int64_t s = 0; s < t.columns; s++, x += t.x_column, w += t.w_column) {
            F32 here[V];
            unrolled<V>([&](auto v) __attribute__((always_inline)) { here[v] = load<F32>(w + v * kLanes, n); });
            each([&](auto i, auto v) __attribute__((always_inline)) {
                sum[i][v] = sum[i][v] + load<F32>(x + i * pixel + v * kLanes, n) * here[v];
            });
        }
    }
    const Chosen act(a.act);
    const F32 p = splat<F32>(a.act_param);
    act.with([&](auto k) __attribute__((always_inline)) {
        each([&](auto i, auto v) __attribute__((always_inline)) {
            const int64_t at = out + i * C + c + v * kLanes;
            F32 z = sum[i][v];
            if (a.residual) z = z + load<F32>(static_cast<const T*>(a.residual) + at, n);
            store(static_cast<T*>(a.out) + at, k.forward(z, p), n);
        });
    });
}

// P pixels of channels [first, last): tiles of V vectors, then of one.
template <int P, int V, int Slide = 0, class T>
FR_INLINE void depthwise_pixels(const Args& a, const Taps<T>& t, int64_t pixel, int64_t out, int64_t first,
                                int64_t last) {
    int64_t c = first;
    const std::integral_constant<int, kLanes> all;
    for (; c + V * kLanes <= last; c += V * kLanes) depthwise_tile<P, V, Slide>(a, t, pixel, out, c, all);
    for (; c + kLanes <= last; c += kLanes) depthwise_tile<P, 1, Slide>(a, t, pixel, out, c, all);
    if (c < last) depthwise_tile<P, 1, Slide>(a, t, pixel, out, c, int(last - c));
}

template <class T>
void depthwise_impl(const Args& a, const Patches& q, const float* weight, int64_t begin, int64_t end) {
    const int64_t C = q.channels, blocks = (C + kDepthwiseBlock - 1) / kDepthwiseBlock, S = q.kernel[1];
    const int64_t pixel = q.stride[1] * C, reach = (S - 1) * q.dilation[1];
    // pixels [left, right) of a row see the kernel's whole width
    const int64_t most = (q.width - 1 - reach + q.padding[1]) / q.stride[1] + 1;
    const int64_t right = q.width <= reach - q.padding[1] ? 0 : most < q.out_width ? most : q.out_width;
    const int64_t from = (q.padding[1] + q.stride[1] - 1) / q.stride[1], left = from < right ? from : right;
    const bool slides = S == kSlidingTaps && q.dilation[1] == 1;
    for (int64_t item = begin; item < end; item++) {
        const int64_t oh = item % q.out_height, block = item / q.out_height % blocks,
                      image = item / q.out_height / blocks;
        const int64_t top = oh * q.stride[0] - q.padding[0];
        const Inside rows(top, q.dilation[0], q.kernel[0], q.height);
        const int64_t first = block * kDepthwiseBlock, last = first + kDepthwiseBlock < C ? first + kDepthwiseBlock : C;
        const T* const line =
            static_cast<const T*>(q.x) + (image * q.height + top + rows.first * q.dilation[0]) * q.width * C;
        const int64_t out = (image * q.out_height + oh) * q.out_width * C;
        const auto taps = [&](int64_t ow, Inside columns) __attribute__((always_inline)) {
            const int64_t w = ow * q.stride[1] - q.padding[1] + columns.first * q.dilation[1];
            return Taps<T>{line + w * C,
                           weight + (rows.first * S + columns.first) * C,
                           rows.last - rows.first,
                           columns.last - columns.first,
                           q.dilation[0] * q.width * C,
                           q.dilation[1] * C,
                           S * C,
                           C};
        };
        const auto alone = [&](int64_t ow, int64_t stop) __attribute__((always_inline)) {
            for (; ow < stop; ow++) {
                const Inside columns(ow * q.stride[1] - q.padding[1], q.dilation[1], S, q.width);
                depthwise_pixels<1, kBorderVectors>(a, taps(ow, columns), pixel, out + ow * C, first, last);
            }
        };
        alone(0, left);
        int64_t ow = left;
        const auto slide = [&](auto stride) __attribute__((always_inline)) {
            for (; ow + kSlidingPixels <= right; ow += kSlidingPixels)
                depthwise_pixels<kSlidingPixels, 1, stride>(a, taps(ow, Inside(0, 1, S, S)), pixel, out + ow * C, first,
                                                            last);
        };
        if (slides && q.stride[1] == 1) slide(std::integral_constant<int, 1>{});
        if (slides && q.stride[1] == 2) slide(std::integral_constant<int, 2>{});
        for (; ow + kDepthwisePixels <= right; ow += kDepthwisePixels)
            depthwise_pixels<kDepthwisePixels, kDepthwiseVectors>(a, taps(ow, Inside(0, 1, S, S)), pixel, out + ow * C,
                                                                  first, last);
        alone(ow, q.out_width);
    }
}

}  // namespace
