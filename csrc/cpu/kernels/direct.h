// Convolutions whose sums stay in registers, channels_last, for inference. A stem with its max-pool never writes the
// convolution's output to memory: its rows go round in a buffer of as many rows as a window of the pool. The others are
// 1x1 convolutions with bias, residual and activation.
#pragma once

#include "vectors.h"

namespace {

// Vectors of output channels, and output pixels: their product is the number of sums in registers.
constexpr int kDirectVectors = 2, kDirectPixels = FR_REGISTERS >= 32 ? 14 : 6;

// A 1x1 convolution's inputs of this many pixels stay in cache while all output channels are computed.
constexpr int64_t kPointwiseRows = 8 * kDirectPixels;

// body(P, at) for pixels [at, at + P) until all of [begin, end) are covered; the last few one at a time.
template <class Body>
FR_INLINE void for_pixels(int64_t begin, int64_t end, Body body) {
    int64_t at = begin;
    for (; at + kDirectPixels <= end; at += kDirectPixels) body(std::integral_constant<int, kDirectPixels>{}, at);
    for (; at < end; at++) body(std::integral_constant<int, 1>{}, at);
}

// P pixels of output channels [k, k + kLanes V): a pixel's patch is `rows` runs of `run` values, `row` apart, the next
// pixel's starts `step` further. w: [rows, run, kDirectBlock].
template <int P, int V, class K>
FR_INLINE void direct_pixels(const float* x, int64_t rows, int64_t row, int64_t run, int64_t step, const float* w,
                             const float* bias, const float* residual, float* out, int64_t channels, const K& act,
                             F32 p) {
    F32 sum[P][V];
    unrolled<P>([&](auto i) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[i][v] = load<F32>(bias + kLanes * v, kLanes); });
    });
    if (residual)
        unrolled<P>([&](auto i) __attribute__((always_inline)) {
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
                __builtin_prefetch(residual + i * channels + kLanes * v);
            });
        });
    for (int64_t r = 0; r < rows; r++, x += row) {
        for (int64_t j = 0; j < run; j++, w += kDirectBlock) {
            F32 here[V];
            unrolled<V>([&](auto v) __attribute__((always_inline)) { here[v] = load<F32>(w + kLanes * v, kLanes); });
            unrolled<P>([&](auto i) __attribute__((always_inline)) {
                const F32 value = x[i * step + j] - F32{};  // the compiler drops - 0, but not + 0
                unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[i][v] = sum[i][v] + value * here[v]; });
            });
        }
    }
    unrolled<P>([&](auto i) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
            F32 z = sum[i][v];
            if (residual) z = z + load<F32>(residual + i * channels + kLanes * v, kLanes);
            store(out + i * channels + kLanes * v, act.forward(z, p), kLanes);
        });
    });
}

// The weights of output channels from k on.
FR_INLINE const float* weight_of(const Direct& q, int64_t k) {
    return static_cast<const float*>(q.weight) +
           k / kDirectBlock * (q.kernel[0] * q.kernel[1] * q.channels * kDirectBlock) + k % kDirectBlock;
}

// Row oh of act(conv(x) + b) of an image.
template <class K>
void stem_row(const Args& a, const Direct& q, int64_t image, int64_t oh, float* rows, float* out) {
    const K act(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t inside = q.width * q.channels, border = q.padding[1] * q.channels, row = inside + 2 * border;
    for (int64_t r = 0; r < q.kernel[0]; r++) {
        const int64_t h = oh * q.stride[0] - q.padding[0] + r;
        float* to = rows + r * row;
        for (int64_t i = 0; i < border; i++) to[i] = to[border + inside + i] = 0;
        const float* from = static_cast<const float*>(a.y) + (image * q.height + h) * inside;
        if (h < 0 || h >= q.height) __builtin_memset(to + border, 0, inside * sizeof(float));
        else __builtin_memcpy(to + border, from, inside * sizeof(float));
    }
    const int64_t run = q.kernel[1] * q.channels, step = q.stride[1] * q.channels, C = q.out_channels;
    const float* bias = static_cast<const float*>(a.norm.shift);
    for (int64_t k = 0; k < C; k += kLanes * kDirectVectors) {
        const float* w = weight_of(q, k);
        for_pixels(0, q.out_width, [&](auto pixels, int64_t at) __attribute__((always_inline)) {
            direct_pixels<pixels, kDirectVectors>(rows + at * step, q.kernel[0], row, run, step, w, bias + k, nullptr,
                                                  out + at * C + k, C, act, p);
        });
    }
}

// Rows [begin, end) of act(x W + b (+ residual)), a 1x1 convolution.
template <class K>
void pointwise_impl(const Args& a, const Direct& q, int64_t begin, int64_t end) {
    const K act(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = q.out_channels;
    const float *x = static_cast<const float*>(a.y), *bias = static_cast<const float*>(a.norm.shift);
    const float* residual = static_cast<const float*>(a.residual);
    float* out = static_cast<float*>(a.out);
    for (int64_t first = begin; first < end; first += kPointwiseRows) {
        const int64_t last = first + kPointwiseRows < end ? first + kPointwiseRows : end;
        for (int64_t k = 0; k < C; k += kLanes * kDirectVectors) {
            const float* w = weight_of(q, k);
            for_pixels(first, last, [&](auto pixels, int64_t at) __attribute__((always_inline)) {
                const int64_t to = at * C + k;
                direct_pixels<pixels, kDirectVectors>(x + at * q.channels, 1, 0, q.channels, q.channels, w, bias + k,
                                                      residual ? residual + to : nullptr, out + to, C, act, p);
            });
        }
    }
}

template <class K>
void stem_impl(const Args& a, const Direct& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    const int64_t C = q.out_channels, size = q.out_width * C, window = pool.kernel[0];
    float* ring = scratch + q.kernel[0] * (q.width + 2 * q.padding[1]) * q.channels;
    int64_t next = 0, last_image = -1;  // the ring has this image's rows below `next` that a window may need
    for (int64_t r = begin; r < end; r++) {
        const int64_t image = r / pool.out_height, ph = r % pool.out_height,
                      top = ph * pool.stride[0] - pool.padding[0];
        const int64_t first = top < 0 ? 0 : top, last = top + window < q.out_height ? top + window : q.out_height;
        if (image != last_image) next = 0, last_image = image;
        for (int64_t h = next < first ? first : next; h < last; h++)
            stem_row<K>(a, q, image, h, scratch, ring + h % window * size);
        next = last;
        const float* lines[kPoolRows];
        for (int64_t h = first; h < last; h++) lines[h - first] = ring + h % window * size;
        float* out = static_cast<float*>(a.out) + r * pool.out_width * C;
        for (int64_t pw = 0; pw < pool.out_width; pw++, out += C) {
            const int64_t side = pw * pool.stride[1] - pool.padding[1], right = side + pool.kernel[1];
            for (int64_t c = 0; c < C; c += kLanes) {
                F32 best = splat<F32>(-__builtin_inf());
                for (int64_t i = 0; i < last - first; i++)
                    for (int64_t w = side < 0 ? 0 : side; w < right && w < q.out_width; w++) {
                        const F32 v = load<F32>(lines[i] + w * C + c, kLanes);
                        best = (v > best) | (v != v) ? v : best;  // NaN stays, as in ATen
                    }
                store(out + c, best, kLanes);
            }
        }
    }
}

}  // namespace
