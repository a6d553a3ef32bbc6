// Winograd's F(MxM, 3x3), M = 2 or 4: the transforms of input, output and weight around (M+2)^2 matrix products.
// Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), section 4.1. The points
// of F(4x4, 3x3) are 0, +-a, +-b with a = sqrt(1/2), b = sqrt(2), not the usual 1 and 2: this halves the mean error
// and quarters the largest.
#pragma once

#include "vectors.h"

namespace {

// One dimension of the transforms, in place; the elements of a vector are `s` apart.
template <int M>
struct Tile;

template <>
struct Tile<2> {
    static constexpr int kIn = 4;
    static FR_INLINE void input(F32* d, int s) {  // B'd
        const F32 d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
        d[0] = d0 - d2;
        d[s] = d1 + d2;
        d[2 * s] = d2 - d1;
        d[3 * s] = d1 - d3;
    }
    static FR_INLINE void output(F32* m, int s) {  // A'm
        const F32 m0 = m[0], m1 = m[s], m2 = m[2 * s], m3 = m[3 * s];
        m[0] = m0 + m1 + m2;
        m[s] = m1 - m2 - m3;
    }
    static FR_INLINE void weight(F32* g, int s) {  // Gg
        const F32 g0 = g[0], g1 = g[s], g2 = g[2 * s];
        g[s] = (g0 + g1 + g2) * 0.5f;
        g[2 * s] = (g0 - g1 + g2) * 0.5f;
        g[3 * s] = g2;
    }
    static FR_INLINE void output_gradient(F32* m, int s) {  // Am
        const F32 m0 = m[0], m1 = m[s];
        m[s] = m0 + m1;
        m[2 * s] = m0 - m1;
        m[3 * s] = -m1;
    }
    static FR_INLINE void weight_gradient(F32* g, int s) {  // G'g
        const F32 sum = (g[s] + g[2 * s]) * 0.5f, difference = (g[s] - g[2 * s]) * 0.5f;
        g[0] = g[0] + sum;
        g[s] = difference;
        g[2 * s] = sum + g[3 * s];
    }
};

template <>
struct Tile<4> {
    static constexpr int kIn = 6;
    static constexpr float a = 0.70710678f, b = 1.41421356f;
    static FR_INLINE void input(F32* d, int s) {
        const F32 d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
        const F32 even_a = d4 - 2.0f * d2, odd_a = a * (d3 - 2.0f * d1);
        const F32 even_b = d4 - 0.5f * d2, odd_b = b * (d3 - 0.5f * d1);
        d[0] = d4 - 2.5f * d2 + d0;
        d[s] = even_a + odd_a;
        d[2 * s] = even_a - odd_a;
        d[3 * s] = even_b + odd_b;
        d[4 * s] = even_b - odd_b;
        d[5 * s] = d5 - 2.5f * d3 + d1;
    }
    static FR_INLINE void output(F32* m, int s) {
        const F32 m0 = m[0], m5 = m[5 * s];
        const F32 even_a = m[s] + m[2 * s], odd_a = a * (m[s] - m[2 * s]);
        const F32 even_b = m[3 * s] + m[4 * s], odd_b = b * (m[3 * s] - m[4 * s]);
        m[0] = m0 + even_a + even_b;
        m[s] = odd_a + odd_b;
        m[2 * s] = 0.5f * even_a + 2.0f * even_b;
        m[3 * s] = 0.5f * odd_a + 2.0f * odd_b + m5;
    }
    static FR_INLINE void weight(F32* g, int s) {
        const F32 g0 = g[0], g1 = g[s], g2 = g[2 * s];
        const F32 even_a = (g0 + 0.5f * g2) * (-2.0f / 3), odd_a = g1 * (a * -2.0f / 3);
        const F32 even_b = (g0 + 2.0f * g2) * (1.0f / 6), odd_b = g1 * (b / 6);
        g[s] = even_a + odd_a;
        g[2 * s] = even_a - odd_a;
        g[3 * s] = even_b + odd_b;
        g[4 * s] = even_b - odd_b;
        g[5 * s] = g2;
    }
    static FR_INLINE void output_gradient(F32* m, int s) {
        const F32 m0 = m[0], m1 = m[s], m2 = m[2 * s], m3 = m[3 * s];
        const F32 even_a = m0 + 0.5f * m2, odd_a = a * (m1 + 0.5f * m3);
        const F32 even_b = m0 + 2.0f * m2, odd_b = b * (m1 + 2.0f * m3);
        m[s] = even_a + odd_a;
        m[2 * s] = even_a - odd_a;
        m[3 * s] = even_b + odd_b;
        m[4 * s] = even_b - odd_b;
        m[5 * s] = m3;
    }
    static FR_INLINE void weight_gradient(F32* g, int s) {
        const F32 even_a = (g[s] + g[2 * s]) * (-2.0f / 3), odd_a = (g[s] - g[2 * s]) * (a * -2.0f / 3);
        const F32 even_b = (g[3 * s] + g[4 * s]) * (1.0f / 6), odd_b = (g[3 * s] - g[4 * s]) * (b / 6);
        g[0] = g[0] + even_a + even_b;
        g[s] = odd_a + odd_b;
        g[2 * s] = 0.5f * even_a + 2.0f * even_b + g[5 * s];
    }
};

// Where a tile of M x M outputs lies: its image, and its first row and column in it.
template <int M>
struct Origin {
    int64_t image, top, left;
    FR_INLINE Origin(const Winograd& q, int64_t tile) {
        image = tile / (q.tiles_h * q.tiles_w);
        const int64_t in_image = tile % (q.tiles_h * q.tiles_w);
        top = in_image / q.tiles_w * M, left = in_image % q.tiles_w * M;
    }
};

// f(i, j, offset) for an M x M part of an image [height, width, channels] at (top, left): offset of the pixel, or -1
// outside the image.
template <int M, class F>
FR_INLINE void by_pixels(int64_t top, int64_t left, int64_t height, int64_t width, int64_t channels, F f) {
    for (int i = 0; i < M; i++) {
        const int64_t h = top + i;
        for (int j = 0; j < M; j++) {
            const int64_t w = left + j;
            f(i, j, h >= 0 && h < height && w >= 0 && w < width ? (h * width + w) * channels : -1);
        }
    }
}

template <int M, class T, class K>
void winograd_input_impl(const Args& a, const Winograd& q, float* v, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const auto transform = [&](auto normed) __attribute__((always_inline)) {
        for (int64_t t = begin; t < end; t++) {
            const Origin<M> at(q, t);
            const T* const image = static_cast<const T*>(a.y) + at.image * q.height * q.width * C;
            by_lanes(C, [&](int64_t c, auto n) __attribute__((always_inline)) {
                F32 d[N * N], scale{}, shift{};
                if constexpr (normed) {
                    scale = load<F32>(static_cast<const float*>(a.norm.scale) + c, n);
                    shift = load<F32>(static_cast<const float*>(a.norm.shift) + c, n);
                }
                by_pixels<N>(at.top - q.padding, at.left - q.padding, q.height, q.width, C,
                             [&](int i, int j, int64_t offset) __attribute__((always_inline)) {
                                 F32& to = d[i * N + j];
                                 to = F32{};  // zero after the prologue
                                 if (offset < 0) return;
                                 to = load<F32>(image + offset + c, n);
                                 if constexpr (normed) to = k.forward(affine(to, scale, shift), p);
                             });
                unrolled<N>([&](auto j) __attribute__((always_inline)) { Tile<M>::input(d + j, N); });
                float* const to = v + (t - q.first) * C + c;
                unrolled<N>([&](auto i) __attribute__((always_inline)) {
                    Tile<M>::input(d + i * N, 1);
                    unrolled<N>([&](auto j) __attribute__((always_inline)) {
                        store(to + (i * N + j) * q.matrix(C), d[i * N + j], n);
                    });
                });
            });
        }
    };
    if (a.norm.scale) transform(std::true_type{});
    else transform(std::false_type{});
}

template <int M, class T, class K>
void winograd_output_impl(const Args& a, const Winograd& q, const float* m, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const T* residual = static_cast<const T*>(a.residual);
    const float *scale = static_cast<const float*>(a.norm.scale), *shift = static_cast<const float*>(a.norm.shift);
    for (int64_t t = begin; t < end; t++) {
        const Origin<M> at(q, t);
        const int64_t image = at.image * q.out_height * q.out_width * q.out_row;
        by_lanes(C, [&](int64_t c, auto n) __attribute__((always_inline)) {
            const float* const from = m + (t - q.first) * C + c;
            F32 d[N * N];
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                unrolled<N>([&](auto i) __attribute__((always_inline)) {
                    d[i * N + j] = load<F32>(from + (i * N + j) * q.matrix(C), n);
                });
                Tile<M>::output(d + j, N);
            });
            unrolled<M>([&](auto i) __attribute__((always_inline)) { Tile<M>::output(d + i * N, 1); });
            by_pixels<M>(at.top, at.left, q.out_height, q.out_width, q.out_row,
                         [&](int i, int j, int64_t offset) __attribute__((always_inline)) {
                             if (offset < 0) return;
                             offset += image + c;
                             F32 z = d[i * N + j];
                             if (shift) {
                                 const F32 to = load<F32>(shift + c, n);
                                 z = scale ? affine(z, load<F32>(scale + c, n), to) : z + to;
                                 if (residual) z = z + load<F32>(residual + offset, n);
                                 z = k.forward(z, p);
                             }
                             store(static_cast<T*>(a.out) + offset, z, n);
                         });
        });
    }
}

template <int M>
void winograd_weight_impl(const WinogradWeight& q, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t k = begin; k < end; k++)
        by_lanes(q.channels, [&](int64_t c, auto n) __attribute__((always_inline)) {
            F32 g[N * N];
            for (int i = 0; i < 3; i++)
                for (int j = 0; j < 3; j++) {
                    const int tap = q.flip ? 8 - 3 * i - j : 3 * i + j;
                    g[i * N + j] = load<F32>(q.weight + (k * 9 + tap) * q.row + c, n);
                }
            unrolled<3>([&](auto j) __attribute__((always_inline)) { Tile<M>::weight(g + j, N); });
            float* const to = q.u + k * q.u_row + c;
            unrolled<N>([&](auto i) __attribute__((always_inline)) {
                Tile<M>::weight(g + i * N, 1);
                unrolled<N>([&](auto j) __attribute__((always_inline)) {
                    store(to + (i * N + j) * q.matrix, g[i * N + j], n);
                });
            });
        });
}

// What winograd_output does with the products, backward, without an epilogue.
template <int M>
void winograd_output_gradient_impl(const float* dy, const Winograd& q, float* m, int64_t K, int64_t begin,
                                   int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t t = begin; t < end; t++) {
        const Origin<M> at(q, t);
        const float* const image = dy + at.image * q.out_height * q.out_width * K;
        by_lanes(K, [&](int64_t k, auto n) __attribute__((always_inline)) {
            F32 d[N * N];
            by_pixels<M>(at.top, at.left, q.out_height, q.out_width, K,
                         [&](int i, int j, int64_t offset) __attribute__((always_inline)) {
                             d[i * N + j] = offset < 0 ? F32{} : load<F32>(image + offset + k, n);
                         });
            unrolled<M>([&](auto j) __attribute__((always_inline)) { Tile<M>::output_gradient(d + j, N); });
            float* const to = m + (t - q.first) * K + k;
            unrolled<N>([&](auto i) __attribute__((always_inline)) {
                Tile<M>::output_gradient(d + i * N, 1);
                unrolled<N>([&](auto j) __attribute__((always_inline)) {
                    store(to + (i * N + j) * q.matrix(K), d[i * N + j], n);
                });
            });
        });
    }
}

// What winograd_weight does, backward.
template <int M>
void winograd_weight_gradient_impl(const float* u, int64_t matrix, float* dw, int64_t C, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t k = begin; k < end; k++)
        by_lanes(C, [&](int64_t c, auto n) __attribute__((always_inline)) {
            F32 g[N * N];
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                unrolled<N>([&](auto i) __attribute__((always_inline)) {
                    g[i * N + j] = load<F32>(u + (i * N + j) * matrix + k * C + c, n);
                });
                Tile<M>::weight_gradient(g + j, N);
            });
            unrolled<3>([&](auto i) __attribute__((always_inline)) {
                Tile<M>::weight_gradient(g + i * N, 1);
                unrolled<3>([&](auto j) __attribute__((always_inline)) {
                    store(dw + (k * 9 + 3 * i + j) * C + c, g[i * N + j], n);
                });
            });
        });
}

}  // namespace
