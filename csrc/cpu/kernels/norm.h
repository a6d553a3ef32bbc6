// BatchNorm with what is around it, forward and backward, and its statistics: passes over blocks.
#pragma once

#include "vectors.h"

namespace {

// Calls body(offset, channel, n) for every vector of blocks [begin, end).
template <int L, class Body>
FR_INLINE void each(const Layout& layout, int64_t begin, int64_t end, Body body) {
    const int64_t size = layout.plane ? layout.plane : layout.channels;
    for (int64_t b = begin; b < end; b++) {
        int64_t i = 0;
        for (; i + L <= size; i += L) body(b * size + i, layout.plane ? b % layout.channels : i, L);
        if (i < size) body(b * size + i, layout.plane ? b % layout.channels : i, int(size - i));
    }
}

template <class T, class O, class K>
void bn_act_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    each<L>(a.layout, begin, end, [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
        store(out + off, k.forward(z_at<T>(a, load<V>(y + off, n), off, c, n), p), n);
    });
}

template <class T, class O>
void convert_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const T* y = static_cast<const T*>(a.y);
    const O* residual = static_cast<const O*>(a.residual);
    O* out = static_cast<O*>(a.out);
    each<L>(a.layout, begin, end, [&](int64_t off, int64_t, int n) __attribute__((always_inline)) {
        const V v = load<V>(y + off, n);
        store(out + off, residual ? v + load<V>(residual + off, n) : v, n);
    });
}

template <class T, class O>
void bn_backward_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const bool plane = a.layout.plane;
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    auto with = [&](auto grad) __attribute__((always_inline)) {
        each<L>(a.layout, begin, end, [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
            const V dz = load<V>(grad + off, n), ka = at<V, S>(a.coef[0], c, n, plane);
            if (!a.coef[1]) return store(out + off, ka * dz, n);
            store(out + off,
                  bn_backward(dz, load<V>(y + off, n), at<V, S>(a.norm.center, c, n, plane), ka,
                              at<V, S>(a.coef[1], c, n, plane), at<V, S>(a.coef[2], c, n, plane)),
                  n);
        });
    };
    // dz has y's type (a block's closing gradient), or the type in which convolutions are computed
    if (a.grad_type == a.y_type) with(static_cast<const T*>(a.grad));
    else with(static_cast<const typename Lanes<T>::scalar*>(a.grad));
}

// Kernels take rows in tiles, so that a channel's sums stay in registers and the rows in L1.
constexpr int64_t kTile = 16;

// Calls tile(channel, n, offset, count, stride) for runs of `count` vectors `stride` elements apart in one channel
// group. The caller flushes.
template <int L, class Body>
FR_INLINE void tiles(const Layout& layout, int64_t begin, int64_t end, Body body) {
    const int64_t C = layout.channels;
    for (int64_t b = begin; b < end; b += kTile) {
        const int64_t rows = end - b < kTile ? end - b : kTile;
        int64_t c = 0;
        for (; c + L <= C; c += L) body(c, L, b * C + c, rows);
        if (c < C) body(c, int(C - c), b * C + c, rows);
    }
}

// The vectors of one channel group, loaded once for all values of the group.
template <class V, class S>
struct Channels {
    V scale, shift, center, residual_scale, residual_shift, residual_center;

    FR_INLINE Channels(const Args& a, int64_t c, int n) {
        const bool plane = a.layout.plane;
        scale = at<V, S>(a.norm.scale, c, n, plane), shift = at<V, S>(a.norm.shift, c, n, plane);
        center = at<V, S>(a.norm.center, c, n, plane);
        if (!a.residual_norm.scale) return;
        residual_scale = at<V, S>(a.residual_norm.scale, c, n, plane);
        residual_shift = at<V, S>(a.residual_norm.shift, c, n, plane);
        residual_center = at<V, S>(a.residual_norm.center, c, n, plane);
    }
};

template <class T, class G, class O, class K>
void bn_act_backward_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    const T* residual = static_cast<const T*>(a.residual);
    const G* grad = static_cast<const G*>(a.grad);
    O* out = static_cast<O*>(a.out);
    const bool normed = a.residual_norm.scale;
    S* sums[3] = {static_cast<S*>(a.sums[0]), static_cast<S*>(a.sums[1]), static_cast<S*>(a.sums[2])};
    // adds `count` vectors of one channel group, `stride` values apart, to their sums
    auto add = [&](const Channels<V, S>& of, int64_t off, int64_t count, int64_t stride, int n, V(&sum)[3])
                   __attribute__((always_inline)) {
                       for (int64_t i = 0; i < count; i++, off += stride) {
                           const V v = load<V>(y + off, n);
                           V z = affine(v, of.scale, of.shift), r{};
                           if (residual) {
                               r = load<V>(residual + off, n);
                               z = z + (normed ? affine(r, of.residual_scale, of.residual_shift) : r);
                           }
                           const V dz = k.backward(load<V>(grad + off, n), z, p);
                           store(out + off, dz, n);
                           sum[0] = sum[0] + dz;
                           sum[1] = sum[1] + dz * (v - of.center);
                           if (normed) sum[2] = sum[2] + dz * (r - of.residual_center);
                       }
                   };
    if (a.layout.plane) {
        const int64_t size = a.layout.plane, whole = size / L;
        const int n = int(size - whole * L);
        for (int64_t b = begin; b < end; b++) {
            const Channels<V, S> of(a, b % a.layout.channels, L);
            V sum[3] = {}, rest[3] = {};
            add(of, b * size, whole, L, L, sum);
            if (n) add(of, b * size + whole * L, 1, L, n, rest);
            for (int i = 0; i < 2 + normed; i++) sums[i][b] = total(sum[i], L) + total(rest[i], n);
        }
        return;
    }
    for (int64_t c = 0; c < a.layout.channels; c++)
        for (int i = 0; i < 2 + normed; i++) sums[i][c] = 0;
    tiles<L>(a.layout, begin, end, [&](int64_t c, int n, int64_t off, int64_t rows) __attribute__((always_inline)) {
        const Channels<V, S> of(a, c, n);
        V sum[3] = {};
        add(of, off, rows, a.layout.channels, n, sum);
        for (int i = 0; i < 2 + normed; i++) store(sums[i] + c, load<V>(sums[i] + c, n) + sum[i], n);
    });
}

// y in T, rounded to O if it is stored. Two passes over a tile that stays in L1; tiles are merged by Chan's formula.
template <class T, class O>
void moments_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    S* mean = static_cast<S*>(a.sums[0]);
    S* m2 = static_cast<S*>(a.sums[1]);
    V buffer[kTile];
    auto fetch = [&](int64_t off, int n) __attribute__((always_inline)) {
        V v = load<V>(y + off, n);
        if (out) {
            store(out + off, v, n);
            v = load<V>(out + off, n);
        }
        return v;
    };
    auto tile = [&](int64_t count) __attribute__((always_inline)) {
        V sum{}, squares{};
        for (int64_t r = 0; r < count; r++) sum = sum + buffer[r];
        const V average = sum * splat<V>(1.0 / count);
        for (int64_t r = 0; r < count; r++) squares = squares + (buffer[r] - average) * (buffer[r] - average);
        return Moments<V, S>{S(count), average, squares};
    };
    if (a.layout.plane) {
        const int64_t size = a.layout.plane;
        for (int64_t b = begin; b < end; b++) {
            Moments<V, S> all{0, V{}, V{}};
            int64_t i = 0;
            while (i + L <= size) {
                int64_t count = 0;
                for (; count < kTile && i + L <= size; count++, i += L) buffer[count] = fetch(b * size + i, L);
                all.merge(tile(count));
            }
            Moments<S, S> plane{0, 0, 0};
            for (int l = 0; l < L; l++) plane.merge({all.count, all.mean[l], all.m2[l]});
            if (i < size) {
                const int n = int(size - i);
                const V tail = fetch(b * size + i, n);
                for (int l = 0; l < n; l++) plane.merge({1, tail[l], 0});
            }
            mean[b] = plane.mean;
            m2[b] = plane.m2;
        }
        return;
    }
    S seen = 0;
    int64_t first = -1;
    tiles<L>(a.layout, begin, end, [&](int64_t c, int n, int64_t off, int64_t rows) __attribute__((always_inline)) {
        if (c == 0) {
            seen = first < 0 ? 0 : seen + S(first);
            first = rows;
        }
        for (int64_t r = 0; r < rows; r++) buffer[r] = fetch(off + r * a.layout.channels, n);
        Moments<V, S> all{seen, seen == 0 ? V{} : load<V>(mean + c, n), seen == 0 ? V{} : load<V>(m2 + c, n)};
        all.merge(tile(rows));
        store(mean + c, all.mean, n);
        store(m2 + c, all.m2, n);
    });
}

}  // namespace
