// A stem's convolution with its max-pool, channels_last, for inference. The convolution's sums stay in registers, and
// its output is never written to memory: its rows go round in a buffer of as many rows as a window of the pool. A
// window of one value is no pool: the rows are the output.
#pragma once

#include "vectors.h"

namespace {

// Vectors of output channels, and output pixels: their product is the number of sums in registers.
constexpr int kStemVectors = 2, kStemPixels = FR_REGISTERS >= 32 ? 14 : 6;

// body(P, at) for pixels [at, at + P) until all of [begin, end) are covered; the last few one at a time.
template <class Body>
FR_INLINE void for_pixels(int64_t begin, int64_t end, Body body) {
    int64_t at = begin;
    for (; at + kStemPixels <= end; at += kStemPixels) body(std::integral_constant<int, kStemPixels>{}, at);
    for (; at < end; at++) body(std::integral_constant<int, 1>{}, at);
}

// P pixels of output channels [k, k + kLanes V): a pixel's patch is `rows` runs of `run` values, `row` apart, the next
// pixel's starts `step` further. w: [rows, run, kStemBlock].
template <int P, int V, class K>
FR_INLINE void stem_pixels(const float* x, int64_t rows, int64_t row, int64_t run, int64_t step, const float* w,
                           const float* bias, float* out, int64_t channels, const K& act, F32 p) {
    F32 sum[P][V];
    unrolled<P>([&](auto i) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[i][v] = load<F32>(bias + kLanes * v, kLanes); });
    });
    for (int64_t r = 0; r < rows; r++, x += row) {
        for (int64_t j = 0; j < run; j++, w += kStemBlock) {
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
            store(out + i * channels + kLanes * v, act.forward(sum[i][v], p), kLanes);
        });
    });
}

// The weights of output channels from k on.
FR_INLINE const float* weight_of(const Stem& q, int64_t k) {
    return static_cast<const float*>(q.weight) +
           k / kStemBlock * (q.kernel[0] * q.kernel[1] * q.channels * kStemBlock) + k % kStemBlock;
}

// Row oh of act(conv(x) + b) of an image.
template <class K>
void stem_row(const Args& a, const Stem& q, int64_t image, int64_t oh, float* rows, float* out) {
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
    for (int64_t k = 0; k < C; k += kLanes * kStemVectors) {
        const float* w = weight_of(q, k);
        for_pixels(0, q.out_width, [&](auto pixels, int64_t at) __attribute__((always_inline)) {
            stem_pixels<pixels, kStemVectors>(rows + at * step, q.kernel[0], row, run, step, w, bias + k,
                                              out + at * C + k, C, act, p);
        });
    }
}

template <class K>
void stem_impl(const Args& a, const Stem& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    const int64_t C = q.out_channels, size = q.out_width * C, window = pool.kernel[0];
    float* ring = scratch + q.kernel[0] * (q.width + 2 * q.padding[1]) * q.channels;
    const bool alone = window == 1 && pool.kernel[1] == 1 && pool.stride[0] == 1 && pool.stride[1] == 1;
    int64_t next = 0, last_image = -1;  // the ring has this image's rows below `next` that a window may need
    for (int64_t r = begin; r < end; r++) {
        const int64_t image = r / pool.out_height, ph = r % pool.out_height,
                      top = ph * pool.stride[0] - pool.padding[0];
        const int64_t first = top < 0 ? 0 : top, last = top + window < q.out_height ? top + window : q.out_height;
        float* out = static_cast<float*>(a.out) + r * pool.out_width * C;
        if (alone) {
            stem_row<K>(a, q, image, ph, scratch, out);
            continue;
        }
        if (image != last_image) next = 0, last_image = image;
        for (int64_t h = next < first ? first : next; h < last; h++)
            stem_row<K>(a, q, image, h, scratch, ring + h % window * size);
        next = last;
        const float* lines[kPoolRows];
        for (int64_t h = first; h < last; h++) lines[h - first] = ring + h % window * size;
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
