// Direct convolutions of rows, channels_last, for inference: the rows that the kernel sees are copied between zeros,
// and the sums of a tile of pixels x output channels stay in registers.
#pragma once

#include "activations.h"
#include "words.h"

namespace {

// Pixels of a tile of one vector of output channels, and of two: as many sums as there are registers, or as many pixels
// as there are registers for their addresses.
constexpr int kDirectPixels[] = {FR_REGISTERS >= 32 ? 14 : 8, FR_REGISTERS >= 32 ? 14 : 6};

// The first tap at `start`, `dilation` apart, that is inside [0, size), and the one after the last.
struct Inside {
    int64_t first, last;
    FR_INLINE Inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
        first = start < 0 ? (dilation - 1 - start) / dilation : 0;
        last = start < size ? (size - 1 - start) / dilation + 1 : 0;
        if (last > taps) last = taps;
        if (first > last) first = last;
    }
};

// body(P, at) for pixels [at, at + P) until all of [begin, end) are covered; P is at most Most.
template <int Most, class Body>
FR_INLINE void for_pixels(int64_t begin, int64_t end, Body body) {
    int64_t at = begin;
    for (; at + Most <= end; at += Most) body(std::integral_constant<int, Most>{}, at);
    constexpr int kFewer = Most > 7 ? 7 : Most > 4 ? 4 : Most / 2;
    if constexpr (kFewer > 0)
        if (at < end) for_pixels<kFewer>(at, end, body);
}

// The copied rows that a kernel sees: a pixel's patch is `rows` runs of `run` values, `row` apart, and the next pixel's
// starts `step` further.
template <class E>
struct Runs {
    const E* x;
    int64_t rows, row, run, step;
};

// P pixels of V vectors of output channels, of n lanes each, to out, `channels` from one pixel to the next: act(sum +
// bias (+ residual)). w: [rows, words of run, columns, elements of a word].
template <int P, int V, class E, class T, class N>
FR_INLINE void direct_pixels(const Runs<E>& patch, const E* w, int64_t columns, const float* bias, const T* residual,
                             T* out, int64_t channels, Chosen act, F32 p, N n) {
    F32 sum[P][V];
    const auto each = [&](auto f) __attribute__((always_inline)) {
        unrolled<P>([&](auto i) __attribute__((always_inline)) {
            unrolled<V>([&](auto v) __attribute__((always_inline)) { f(i, v); });
        });
    };
    each([&](auto i, auto v) __attribute__((always_inline)) { sum[i][v] = load<F32>(bias + kLanes * v, n); });
    using Words = typename Word<E>::vector;
    const E* x = patch.x;
    for (int64_t r = 0; r < patch.rows; r++, x += patch.row) {
        const auto add = [&](int64_t j, auto elements) __attribute__((always_inline)) {
            Words here[V];
            unrolled<V>([&](auto v) __attribute__((always_inline)) {
                here[v] = (Words)load<F32>(reinterpret_cast<const float*>(w + kLanes * v * kWord<E>), n);
            });
            unrolled<P>([&](auto i) __attribute__((always_inline)) {
                typename Word<E>::type word{};
                __builtin_memcpy(&word, x + i * patch.step + j, elements * sizeof(E));
                const Words value = word - Words{};  // the compiler drops - 0, but not + 0
                unrolled<V>([&](auto v) __attribute__((always_inline)) {
                    sum[i][v] = Word<E>::add(sum[i][v], value, here[v]);
                });
            });
            w += columns * kWord<E>;
        };
        int64_t j = 0;
        for (; j + kWord<E> <= patch.run; j += kWord<E>) add(j, std::integral_constant<int, kWord<E>>{});
        if constexpr (kWord<E> > 1)
            if (j < patch.run) add(j, std::integral_constant<int, 1>{});
    }
    act.with([&](auto k) __attribute__((always_inline)) {
        each([&](auto i, auto v) __attribute__((always_inline)) {
            F32 z = sum[i][v];
            if (residual) z = z + load<F32>(residual + i * channels + kLanes * v, n);
            store(out + i * channels + kLanes * v, k.forward(z, p), n);
        });
    });
}

// A row of outputs of [0, columns) channels that start at bias, residual and out. weight: as w above.
template <class T, class E>
FR_INLINE void direct_row(Runs<E> patch, const E* weight, int64_t columns, const float* bias, const T* residual, T* out,
                          int64_t width, int64_t channels, Chosen act, F32 p) {
    const E* const x = patch.x;
    const auto pixels = [&](int64_t c, auto vectors, auto n) __attribute__((always_inline)) {
        for_pixels<kDirectPixels[vectors - 1]>(0, width, [&](auto count, int64_t at) __attribute__((always_inline)) {
            patch.x = x + at * patch.step;
            direct_pixels<count, vectors, E, T>(patch, weight + c * kWord<E>, columns, bias + c,
                                                residual ? residual + at * channels + c : nullptr,
                                                out + at * channels + c, channels, act, p, n);
        });
    };
    const std::integral_constant<int, kLanes> all;
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) pixels(c, std::integral_constant<int, 2>{}, all);
    for (; c + kLanes <= columns; c += kLanes) pixels(c, std::integral_constant<int, 1>{}, all);
    if (c < columns) pixels(c, std::integral_constant<int, 1>{}, int(columns - c));
}

// Copies channels [0, depth) of a row of `width` pixels, `pixel` apart, between `border` zeros on either side.
template <class T, class E>
FR_INLINE void copy_row(const T* from, int64_t width, int64_t pixel, int64_t depth, int64_t border, E* to) {
    for (int64_t i = 0; i < border; i++) to[i] = to[border + width * depth + i] = E{};
    to += border;
    if (pixel == depth) return copy_values(from, width * depth, to);
    for (int64_t i = 0; i < width; i++, from += pixel, to += depth) copy_by_lanes(from, depth, to);
}

// Rows [begin, end) of N * groups * oH. weight: [groups, R, words of S * depth, columns, elements of a word].
template <class T>
void grouped_impl(const Args& a, const Patches& q, const void* weight, int64_t groups, float* scratch, int64_t begin,
                  int64_t end) {
    using E = typename Multiplied<T>::type;
    E* const copy = reinterpret_cast<E*>(scratch);
    const Chosen act(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t channels = a.layout.channels, depth = q.channels / groups, columns = channels / groups;
    const int64_t border = q.padding[1] * depth, row = q.width * depth + 2 * border, run = q.kernel[1] * depth;
    for (int64_t item = begin; item < end; item++) {
        const int64_t oh = item % q.out_height, group = item / q.out_height % groups,
                      image = item / q.out_height / groups, top = oh * q.stride[0] - q.padding[0];
        const Inside rows(top, 1, q.kernel[0], q.height);
        for (int64_t r = rows.first; r < rows.last; r++)
            copy_row(static_cast<const T*>(q.x) + (image * q.height + top + r) * q.width * q.channels + group * depth,
                     q.width, q.channels, depth, border, copy + (r - rows.first) * row);
        const int64_t out = (image * q.out_height + oh) * q.out_width * channels + group * columns;
        direct_row(Runs<E>{copy, rows.last - rows.first, row, run, q.stride[1] * depth},
                   static_cast<const E*>(weight) + (group * q.kernel[0] + rows.first) * whole_words<E>(run) * columns,
                   columns, static_cast<const float*>(a.norm.shift) + group * columns,
                   a.residual ? static_cast<const T*>(a.residual) + out : nullptr, static_cast<T*>(a.out) + out,
                   q.out_width, channels, act, p);
    }
}

}  // namespace
