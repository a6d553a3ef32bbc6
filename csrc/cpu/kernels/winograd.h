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

template <int M, class T, class K>
void winograd_input_impl(const Args& a, const Winograd& q, float* v, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const T* y = static_cast<const T*>(a.y);
    for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / (q.tiles_h * q.tiles_w), in_image = t % (q.tiles_h * q.tiles_w);
        const int64_t top = in_image / q.tiles_w * M - q.padding, left = in_image % q.tiles_w * M - q.padding;
        for (int64_t c = 0; c < C; c += kLanes) {
            const int n = C - c < kLanes ? int(C - c) : kLanes;
            F32 d[N * N];
            for (int i = 0; i < N; i++)
                for (int j = 0; j < N; j++) {
                    const int64_t h = top + i, w = left + j;
                    if (h < 0 || h >= q.height || w < 0 || w >= q.width) {
                        d[i * N + j] = F32{};  // zero after the prologue
                        continue;
                    }
                    const int64_t off = ((image * q.height + h) * q.width + w) * C + c;
                    d[i * N + j] = load<F32>(y + off, n);
                    if (a.norm.scale) d[i * N + j] = k.forward(z_at<T>(a, d[i * N + j], off, c, n), p);
                }
            for (int j = 0; j < N; j++) Tile<M>::input(d + j, N);
            for (int i = 0; i < N; i++) Tile<M>::input(d + i * N, 1);
            float* to = v + (t - q.first) * C + c;
            for (int i = 0; i < N * N; i++) store(to + i * q.count * C, d[i], n);
        }
    }
}

template <int M, class T, class K>
void winograd_output_impl(const Args& a, const Winograd& q, const float* m, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const T* residual = static_cast<const T*>(a.residual);
    T* out = static_cast<T*>(a.out);
    for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / (q.tiles_h * q.tiles_w), in_image = t % (q.tiles_h * q.tiles_w);
        const int64_t top = in_image / q.tiles_w * M, left = in_image % q.tiles_w * M;
        for (int64_t c = 0; c < C; c += kLanes) {
            const int n = C - c < kLanes ? int(C - c) : kLanes;
            const float* from = m + (t - q.first) * C + c;
            F32 d[N * N];
            for (int i = 0; i < N * N; i++) d[i] = load<F32>(from + i * q.count * C, n);
            for (int j = 0; j < N; j++) Tile<M>::output(d + j, N);
            for (int i = 0; i < M; i++) Tile<M>::output(d + i * N, 1);
            for (int i = 0; i < M && top + i < q.out_height; i++)
                for (int j = 0; j < M && left + j < q.out_width; j++) {
                    F32 z = d[i * N + j];
                    const int64_t off = ((image * q.out_height + top + i) * q.out_width + left + j) * C + c;
                    if (a.norm.shift) {
                        const F32 shift = load<F32>(static_cast<const float*>(a.norm.shift) + c, n);
                        z = a.norm.scale ? affine(z, load<F32>(static_cast<const float*>(a.norm.scale) + c, n), shift)
                                         : z + shift;
                        if (residual) z = z + load<F32>(residual + off, n);
                        z = k.forward(z, p);
                    }
                    store(out + off, z, n);
                }
        }
    }
}

template <int M>
void winograd_weight_impl(const float* weight, float* u, int64_t K, int64_t C, bool flip, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t k = begin; k < end; k++)
        for (int64_t c = 0; c < C; c += kLanes) {
            const int n = C - c < kLanes ? int(C - c) : kLanes;
            F32 g[N * N];
            for (int i = 0; i < 3; i++)
                for (int j = 0; j < 3; j++) {
                    const int at_row = flip ? 2 - i : i, at_column = flip ? 2 - j : j;
                    g[i * N + j] = load<F32>(weight + ((k * 3 + at_row) * 3 + at_column) * C + c, n);
                }
            for (int j = 0; j < 3; j++) Tile<M>::weight(g + j, N);
            for (int i = 0; i < N; i++) Tile<M>::weight(g + i * N, 1);
            float* to = u + k * C + c;
            for (int i = 0; i < N * N; i++) store(to + i * K * C, g[i], n);
        }
}

// What winograd_output does with the products, backward, without an epilogue.
template <int M>
void winograd_output_gradient_impl(const float* dy, const Winograd& q, float* m, int64_t K, int64_t begin,
                                   int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / (q.tiles_h * q.tiles_w), in_image = t % (q.tiles_h * q.tiles_w);
        const int64_t top = in_image / q.tiles_w * M, left = in_image % q.tiles_w * M;
        for (int64_t k = 0; k < K; k += kLanes) {
            const int n = K - k < kLanes ? int(K - k) : kLanes;
            F32 d[N * N];
            for (int i = 0; i < M; i++)
                for (int j = 0; j < M; j++) {
                    const int64_t h = top + i, w = left + j;
                    const bool inside = h < q.out_height && w < q.out_width;
                    d[i * N + j] =
                        inside ? load<F32>(dy + ((image * q.out_height + h) * q.out_width + w) * K + k, n) : F32{};
                }
            for (int j = 0; j < M; j++) Tile<M>::output_gradient(d + j, N);
            for (int i = 0; i < N; i++) Tile<M>::output_gradient(d + i * N, 1);
            float* to = m + (t - q.first) * K + k;
            for (int i = 0; i < N * N; i++) store(to + i * q.count * K, d[i], n);
        }
    }
}

// What winograd_weight does, backward.
template <int M>
void winograd_weight_gradient_impl(const float* u, float* dw, int64_t K, int64_t C, int64_t begin, int64_t end) {
    constexpr int N = Tile<M>::kIn;
    for (int64_t k = begin; k < end; k++)
        for (int64_t c = 0; c < C; c += kLanes) {
            const int n = C - c < kLanes ? int(C - c) : kLanes;
            F32 g[N * N];
            for (int i = 0; i < N * N; i++) g[i] = load<F32>(u + (i * K + k) * C + c, n);
            for (int j = 0; j < N; j++) Tile<M>::weight_gradient(g + j, N);
            for (int i = 0; i < 3; i++) Tile<M>::weight_gradient(g + i * N, 1);
            for (int i = 0; i < 3; i++)
                for (int j = 0; j < 3; j++) store(dw + ((k * 3 + i) * 3 + j) * C + c, g[i * N + j], n);
        }
}

}  // namespace
