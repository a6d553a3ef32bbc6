// Winograd's F(2x2, 3x3): the transforms of input, output and weight around 16 matrix products.
// Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), section 4.1.
#pragma once

#include "vectors_impl.h"

namespace {

FR_INLINE void rows4(F32 (&d)[4][4]) {  // B' d
    for (int j = 0; j < 4; j++) {
        const F32 a = d[0][j] - d[2][j], b = d[1][j] + d[2][j], c = d[2][j] - d[1][j], e = d[1][j] - d[3][j];
        d[0][j] = a, d[1][j] = b, d[2][j] = c, d[3][j] = e;
    }
}
FR_INLINE void columns4(F32 (&d)[4][4]) {  // d B
    for (int i = 0; i < 4; i++) {
        const F32 a = d[i][0] - d[i][2], b = d[i][1] + d[i][2], c = d[i][2] - d[i][1], e = d[i][1] - d[i][3];
        d[i][0] = a, d[i][1] = b, d[i][2] = c, d[i][3] = e;
    }
}

template <class T, class K>
void winograd_input_impl(const Args& a, const Winograd& q, float* v, int64_t begin, int64_t end) {
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const T* y = static_cast<const T*>(a.y);
    for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / (q.tiles_h * q.tiles_w), in_image = t % (q.tiles_h * q.tiles_w);
        const int64_t top = in_image / q.tiles_w * 2 - q.padding, left = in_image % q.tiles_w * 2 - q.padding;
        for (int64_t c = 0; c < C; c += 16) {
            const int n = C - c < 16 ? int(C - c) : 16;
            F32 d[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    const int64_t h = top + i, w = left + j;
                    if (h < 0 || h >= q.height || w < 0 || w >= q.width) {
                        d[i][j] = F32{};  // zero after the prologue
                        continue;
                    }
                    const int64_t off = ((image * q.height + h) * q.width + w) * C + c;
                    d[i][j] = load<F32>(y + off, n);
                    if (a.norm.scale) d[i][j] = k.forward(z_at<T>(a, d[i][j], off, c, n), p);
                }
            rows4(d);
            columns4(d);
            float* to = v + (t - q.first) * C + c;
            for (int i = 0; i < 16; i++) store(to + i * q.count * C, d[i / 4][i % 4], n);
        }
    }
}

template <class T, class K>
void winograd_output_impl(const Args& a, const Winograd& q, const float* m, int64_t begin, int64_t end) {
    const K k(a.act);
    const F32 p = splat<F32>(a.act_param);
    const int64_t C = a.layout.channels;
    const T* residual = static_cast<const T*>(a.residual);
    T* out = static_cast<T*>(a.out);
    for (int64_t t = begin; t < end; t++) {
        const int64_t image = t / (q.tiles_h * q.tiles_w), in_image = t % (q.tiles_h * q.tiles_w);
        const int64_t top = in_image / q.tiles_w * 2, left = in_image % q.tiles_w * 2;
        for (int64_t c = 0; c < C; c += 16) {
            const int n = C - c < 16 ? int(C - c) : 16;
            const float* from = m + (t - q.first) * C + c;
            F32 d[2][4];
            for (int j = 0; j < 4; j++) {  // A' m
                const F32 m0 = load<F32>(from + j * q.count * C, n), m1 = load<F32>(from + (4 + j) * q.count * C, n);
                const F32 m2 = load<F32>(from + (8 + j) * q.count * C, n), m3 = load<F32>(from + (12 + j) * q.count * C, n);
                d[0][j] = m0 + m1 + m2;
                d[1][j] = m1 - m2 - m3;
            }
            for (int i = 0; i < 2 && top + i < q.out_height; i++)
                for (int j = 0; j < 2 && left + j < q.out_width; j++) {
                    F32 z = j ? d[i][1] - d[i][2] - d[i][3] : d[i][0] + d[i][1] + d[i][2];
                    const int64_t off = ((image * q.out_height + top + i) * q.out_width + left + j) * C + c;
                    if (a.norm.shift) {
                        z = z + load<F32>(static_cast<const float*>(a.norm.shift) + c, n);
                        if (residual) z = z + load<F32>(residual + off, n);
                        z = k.forward(z, p);
                    }
                    store(out + off, z, n);
                }
        }
    }
}

void winograd_weight_impl(const float* weight, float* u, int64_t K, int64_t C, bool flip, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
        for (int64_t c = 0; c < C; c += 16) {
            const int n = C - c < 16 ? int(C - c) : 16;
            F32 g[4][3];
            for (int j = 0; j < 3; j++) {  // G g
                F32 w[3];
                for (int i = 0; i < 3; i++) {
                    const int at_row = flip ? 2 - i : i, at_column = flip ? 2 - j : j;
                    w[i] = load<F32>(weight + ((k * 3 + at_row) * 3 + at_column) * C + c, n);
                }
                g[0][j] = w[0];
                g[1][j] = (w[0] + w[1] + w[2]) * 0.5f;
                g[2][j] = (w[0] - w[1] + w[2]) * 0.5f;
                g[3][j] = w[2];
            }
            float* to = u + k * C + c;
            for (int i = 0; i < 4; i++) {
                store(to + (i * 4 + 0) * K * C, g[i][0], n);
                store(to + (i * 4 + 1) * K * C, (g[i][0] + g[i][1] + g[i][2]) * 0.5f, n);
                store(to + (i * 4 + 2) * K * C, (g[i][0] - g[i][1] + g[i][2]) * 0.5f, n);
                store(to + (i * 4 + 3) * K * C, g[i][2], n);
            }
        }
}

}  // namespace
