// A stem in inference: max-pool(act(conv(x, W) + b)) of an image of few channels, channels_last, without the convolution's
// output in memory: its rows go round in a buffer of as many as a window of the pool has.
#pragma once

#include "vectors_impl.h"

namespace {

// Vectors of output channels and output pixels whose sums stay in registers (GCC's target pragma defines no __AVX512F__).
constexpr int kStemVectors = FR_WIDE_REGISTERS >= 32 ? 2 : 1, kStemPixels = FR_WIDE_REGISTERS >= 32 ? 14 : 4;

// f(0) ... f(N - 1) with constants, so that arrays indexed by them are registers: a loop is unrolled too late for that.
template <int N, class F>
FR_INLINE void unrolled(F f) {
    if constexpr (N > 1) unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
}

// Output pixels [at, at + P) of a row, output channels [k, k + 16 V): the patch of a pixel is a run of S*C values per row.
template <int P, int V, class K>
FR_INLINE void stem_pixels(const Args& a, const Stem& q, const float* rows, int64_t row, int64_t at, int64_t k, const K& act, F32 p,
                           float* out) {
    const int64_t run = q.kernel[1] * q.channels, step = q.stride[1] * q.channels;
    const float* w = static_cast<const float*>(q.weight) + k / kStemBlock * (q.kernel[0] * run * kStemBlock) + k % kStemBlock;
    F32 sum[P][V];
    unrolled<P>([&](auto i) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
            sum[i][v] = load<F32>(static_cast<const float*>(a.norm.shift) + k + 16 * v, 16);
        });
    });
    for (int64_t r = 0; r < q.kernel[0]; r++) {
        const float* x = rows + r * row + at * step;
        for (int64_t j = 0; j < run; j++, w += kStemBlock) {
            F32 here[V];
            unrolled<V>([&](auto v) __attribute__((always_inline)) { here[v] = load<F32>(w + 16 * v, 16); });
            unrolled<P>([&](auto i) __attribute__((always_inline)) {
                const F32 value = x[i * step + j] - F32{};  // minus 0 is nothing, plus 0 is an addition
                unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[i][v] = sum[i][v] + value * here[v]; });
            });
        }
    }
    unrolled<P>([&](auto i) __attribute__((always_inline)) {
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
            store(out + (at + i) * q.out_channels + k + 16 * v, act.forward(sum[i][v], p), 16);
        });
    });
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
    for (int64_t k = 0; k < q.out_channels; k += 16 * kStemVectors) {
        // the last pixels together with some that are done: the same values once more
        for (int64_t at = 0; at < q.out_width && q.out_width >= kStemPixels; at += kStemPixels)
            stem_pixels<kStemPixels, kStemVectors>(a, q, rows, row, at + kStemPixels <= q.out_width ? at : q.out_width - kStemPixels,
                                                   k, act, p, out);
        for (int64_t at = 0; at < q.out_width && q.out_width < kStemPixels; at++)
            stem_pixels<1, kStemVectors>(a, q, rows, row, at, k, act, p, out);
    }
}

template <class K>
void stem_impl(const Args& a, const Stem& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    const int64_t C = q.out_channels, size = q.out_width * C, window = pool.kernel[0];
    float* ring = scratch + q.kernel[0] * (q.width + 2 * q.padding[1]) * q.channels;
    int64_t next = 0, last_image = -1;  // rows of this image below `next` that a window may want are in the ring
    for (int64_t r = begin; r < end; r++) {
        const int64_t image = r / pool.out_height, ph = r % pool.out_height, top = ph * pool.stride[0] - pool.padding[0];
        const int64_t first = top < 0 ? 0 : top, last = top + window < q.out_height ? top + window : q.out_height;
        if (image != last_image) next = 0, last_image = image;
        for (int64_t h = next < first ? first : next; h < last; h++)
            stem_row<K>(a, q, image, h, scratch, ring + h % window * size);
        next = last;
        const float* lines[kStemWindow];
        for (int64_t h = first; h < last; h++) lines[h - first] = ring + h % window * size;
        float* out = static_cast<float*>(a.out) + r * pool.out_width * C;
        for (int64_t pw = 0; pw < pool.out_width; pw++, out += C) {
            const int64_t side = pw * pool.stride[1] - pool.padding[1], right = side + pool.kernel[1];
            for (int64_t c = 0; c < C; c += 16) {
                F32 best = splat<F32>(-__builtin_inf());
                for (int64_t i = 0; i < last - first; i++)
                    for (int64_t w = side < 0 ? 0 : side; w < right && w < q.out_width; w++) {
                        const F32 v = load<F32>(lines[i] + w * C + c, 16);
                        best = (v > best) | (v != v) ? v : best;  // NaN stays, as in ATen
                    }
                store(out + c, best, 16);
            }
        }
    }
}

}  // namespace
