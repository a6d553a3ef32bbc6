// A stem's convolution with its max-pool, channels_last, for inference. The convolution's sums stay in registers, and
// its output is never written to memory: its rows go round in a buffer of as many rows as a window of the pool. A
// window of one value is no pool: the rows are the output.
#pragma once

#include "direct.h"

namespace {

// Row oh of act(conv(x) + b) of an image of elements T.
template <class T, class O>
void stem_row(const Args& a, const Stem& q, int64_t image, int64_t oh, float* rows, O* out) {
    const Chosen act(a.act);
    const F32 p = splat<F32>(a.act_param);
    using E = typename Multiplied<T>::type;
    E* const copy = reinterpret_cast<E*>(rows);
    const int64_t inside = q.width * q.channels, border = q.padding[1] * q.channels, row = inside + 2 * border;
    for (int64_t r = 0; r < q.kernel[0]; r++) {
        const int64_t h = oh * q.stride[0] - q.padding[0] + r;
        if (h < 0 || h >= q.height) __builtin_memset(copy + r * row, 0, row * sizeof(E));
        else
            copy_row(static_cast<const T*>(a.y) + (image * q.height + h) * inside, q.width, q.channels, q.channels,
                     border, copy + r * row);
    }
    const int64_t run = q.kernel[1] * q.channels, taps = q.kernel[0] * whole_words<E>(run);
    const Runs<E> patch{copy, q.kernel[0], row, run, q.stride[1] * q.channels};
    for (int64_t k = 0; k < q.out_channels; k += kStemBlock)
        direct_row<O>(patch, static_cast<const E*>(q.weight) + k * taps, kStemBlock,
                      static_cast<const float*>(a.norm.shift) + k, nullptr, out + k, q.out_width, q.out_channels, act,
                      p);
}

template <class T>
void stem_impl(const Args& a, const Stem& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    const int64_t C = q.out_channels, size = q.out_width * C, window = pool.kernel[0];
    float* ring = scratch + q.kernel[0] * (q.width + 2 * q.padding[1]) * q.channels;
    const bool alone = window == 1 && pool.kernel[1] == 1 && pool.stride[0] == 1 && pool.stride[1] == 1;
    int64_t next = 0, last_image = -1;  // the ring has this image's rows below `next` that a window may need
    for (int64_t r = begin; r < end; r++) {
        const int64_t image = r / pool.out_height, ph = r % pool.out_height,
                      top = ph * pool.stride[0] - pool.padding[0];
        const int64_t first = top < 0 ? 0 : top, last = top + window < q.out_height ? top + window : q.out_height;
        T* out = static_cast<T*>(a.out) + r * pool.out_width * C;
        if (alone) {
            stem_row<T, T>(a, q, image, ph, scratch, out);
            continue;
        }
        if (image != last_image) next = 0, last_image = image;
        for (int64_t h = next < first ? first : next; h < last; h++)
            stem_row<T, float>(a, q, image, h, scratch, ring + h % window * size);
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
