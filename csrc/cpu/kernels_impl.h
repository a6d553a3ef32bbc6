// The kernels, written once over 64-byte vectors of the compiler's own; included by one file per instruction set, after
// its `#pragma GCC target`. Includes no header of the standard library: its code, compiled here, could be linked elsewhere.
#pragma once

#include "kernels.h"

typedef float F32 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef _Float16 F16 __attribute__((vector_size(32)));

namespace fused_resnet {

// exp to about 1 ulp: x = n ln2 + r, |r| <= ln2/2, a polynomial in r (Cephes expf), times 2^n in two steps.
template <>
struct Exponential<F32> {
    static FR_INLINE F32 of(F32 x) {
        const F32 lo = F32{} - 104.f, hi = F32{} + 89.f;
        const F32 x0 = x < lo ? lo : (x > hi ? hi : x);  // NaN stays
        const F32 magic = F32{} + 12582912.f;            // 1.5 * 2^23: adding it rounds to an integer
        const F32 n = (x0 * 1.44269504088896341f + magic) - magic;
        const F32 r = x0 - n * 0.693359375f - n * -2.12194440e-4f;
        F32 q = F32{} + 1.9875691500e-4f;
        q = q * r + 1.3981999507e-3f;
        q = q * r + 8.3334519073e-3f;
        q = q * r + 4.1665795894e-2f;
        q = q * r + 1.6666665459e-1f;
        q = q * r + 5.0000001201e-1f;
        q = q * r * r + r + 1.f;
        const I32 k = __builtin_convertvector(n == n ? n : F32{}, I32), half = k >> 1;
        return q * (F32)((half + 127) << 23) * (F32)((k - half + 127) << 23);
    }
};
template <>
struct Exponential<F64> {
    static FR_INLINE F64 of(F64 x) {
        for (int i = 0; i < 8; i++) x[i] = __builtin_exp(x[i]);
        return x;
    }
};

}  // namespace fused_resnet

namespace {

using namespace fused_resnet;
using namespace fused_resnet::cpu;

struct bf16 {
    uint16_t bits;
};

template <class T>
struct Lanes {  // of a tensor's element type: the vector it is computed in
    using vector = F32;
    using scalar = float;
};
template <>
struct Lanes<double> {
    using vector = F64;
    using scalar = double;
};

FR_INLINE F32 widen(U16 raw, bf16) { return (F32)(__builtin_convertvector(raw, U32) << 16); }
FR_INLINE F32 widen(U16 raw, _Float16) { return __builtin_convertvector((F16)raw, F32); }
FR_INLINE U16 narrow(F32 v, bf16) {  // to nearest, ties to even; NaN stays NaN
    const U32 u = (U32)v;
    const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U32 nan = U32{} + 0x7fc0u;
    return __builtin_convertvector((u & 0x7fffffffu) > (U32{} + 0x7f800000u) ? nan : rounded, U16);
}
FR_INLINE U16 narrow(F32 v, _Float16) { return (U16)__builtin_convertvector(v, F16); }

// n of the vector's lanes from p, the others 0.
template <class V, class T>
FR_INLINE V load(const T* p, int n) {
    constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
    if constexpr (sizeof(T) == sizeof(V{}[0])) {
        V v{};
        if (n == lanes) __builtin_memcpy(&v, p, sizeof v);
        else __builtin_memcpy(&v, p, n * sizeof(T));
        return v;
    } else {
        U16 raw{};
        if (n == lanes) __builtin_memcpy(&raw, p, sizeof raw);
        else __builtin_memcpy(&raw, p, n * sizeof(T));
        return widen(raw, T{});
    }
}

template <class V, class T>
FR_INLINE void store(T* p, V v, int n) {
    constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
    if constexpr (sizeof(T) == sizeof(V{}[0])) {
        if (n == lanes) __builtin_memcpy(p, &v, sizeof v);
        else __builtin_memcpy(p, &v, n * sizeof(T));
    } else {
        const U16 raw = narrow(v, T{});
        if (n == lanes) __builtin_memcpy(p, &raw, sizeof raw);
        else __builtin_memcpy(p, &raw, n * sizeof(T));
    }
}

FR_INLINE double total(F64 v, int n) {
    double s = 0;
    for (int i = 0; i < n; i++) s += v[i];
    return s;
}
FR_INLINE float total(F32 v, int n) {
    float s = 0;
    for (int i = 0; i < n; i++) s += v[i];
    return s;
}

// A per-channel vector at channel c: lanes are channels (channels_last) or one channel repeated (NCHW).
template <class V, class S>
FR_INLINE V at(const void* p, int64_t c, int n, bool plane) {
    const S* q = static_cast<const S*>(p) + c;
    return plane ? V{} + *q : load<V>(q, n);
}

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

template <class T>
FR_INLINE typename Lanes<T>::vector z_at(const Args& a, typename Lanes<T>::vector y, int64_t off, int64_t c, int n) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    const bool plane = a.layout.plane;
    V z = affine(y, at<V, S>(a.norm.scale, c, n, plane), at<V, S>(a.norm.shift, c, n, plane));
    if (a.residual) {
        const V r = load<V>(static_cast<const T*>(a.residual) + off, n);
        z = z + (a.residual_norm.scale ? affine(r, at<V, S>(a.residual_norm.scale, c, n, plane),
                                                at<V, S>(a.residual_norm.shift, c, n, plane))
                                       : r);
    }
    return z;
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
    // dz has dy's type, or (a block's closing gradient) y's
    if (a.grad_type == a.other_type) with(static_cast<const O*>(a.grad));
    else with(static_cast<const T*>(a.grad));
}

// Rows are taken in tiles, so that a channel's sums stay in registers for a while and the rows in L1.
constexpr int64_t kTile = 16;

// Calls tile(channel, n, offset, count, stride) for runs of `count` vectors `stride` elements apart in one channel
// group; flush is up to the caller.
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

template <class T, class G, class K>
void bn_act_backward_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const bool plane = a.layout.plane;
    const T* y = static_cast<const T*>(a.y);
    const T* residual = static_cast<const T*>(a.residual);
    const G* grad = static_cast<const G*>(a.grad);
    G* out = static_cast<G*>(a.out);
    const bool third = a.sums[2];
    S* sums[3] = {static_cast<S*>(a.sums[0]), static_cast<S*>(a.sums[1]), static_cast<S*>(a.sums[2])};
    V s0{}, s1{}, s2{};
    auto one = [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
        const V v = load<V>(y + off, n);
        const V dz = k.backward(load<V>(grad + off, n), z_at<T>(a, v, off, c, n), p);
        store(out + off, dz, n);
        s0 = s0 + dz;
        s1 = s1 + dz * (v - at<V, S>(a.norm.center, c, n, plane));
        if (third) s2 = s2 + dz * (load<V>(residual + off, n) - at<V, S>(a.residual_norm.center, c, n, plane));
    };
    if (plane) {
        const int64_t size = a.layout.plane, C = a.layout.channels;
        for (int64_t b = begin; b < end; b++) {
            V t0{}, t1{}, t2{};
            int64_t i = 0;
            s0 = s1 = s2 = V{};
            for (; i + L <= size; i += L) one(b * size + i, b % C, L);
            t0 = s0, t1 = s1, t2 = s2;
            s0 = s1 = s2 = V{};
            const int n = int(size - i);
            if (n) one(b * size + i, b % C, n);
            sums[0][b] = total(t0, L) + total(s0, n);
            sums[1][b] = total(t1, L) + total(s1, n);
            if (third) sums[2][b] = total(t2, L) + total(s2, n);
        }
        return;
    }
    for (int64_t c = 0; c < a.layout.channels; c++)
        for (int i = 0; i < 2 + third; i++) sums[i][c] = 0;
    tiles<L>(a.layout, begin, end, [&](int64_t c, int n, int64_t off, int64_t rows) __attribute__((always_inline)) {
        s0 = s1 = s2 = V{};
        for (int64_t r = 0; r < rows; r++) one(off + r * a.layout.channels, c, n);
        store(sums[0] + c, load<V>(sums[0] + c, n) + s0, n);
        store(sums[1] + c, load<V>(sums[1] + c, n) + s1, n);
        if (third) store(sums[2] + c, load<V>(sums[2] + c, n) + s2, n);
    });
}

// y in T, rounded to O when it is to be stored. Two passes over a tile that stays in L1, tiles merged by Chan.
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

// ------------------------------------------------------------------------------------------- the stem's max-pool
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef uint8_t U8x8 __attribute__((vector_size(8)));
typedef int64_t I64 __attribute__((vector_size(64)));

// One vector of a tensor's channels (channels_last), or one value of a plane (NCHW), and the places of maxima beside it.
template <class V>
struct Place;
template <class V, class P, class B, int N>
struct VectorPlace {
    using places = P;
    static constexpr int lanes = N;
    static FR_INLINE P every(int64_t value) { return P{} + static_cast<decltype(P{}[0] + 0)>(value); }
    static FR_INLINE P read(const uint8_t* from, int n) {
        B bytes{};
        if (n == N) __builtin_memcpy(&bytes, from, N);
        else __builtin_memcpy(&bytes, from, n);
        return __builtin_convertvector(bytes, P);
    }
    static FR_INLINE void write(uint8_t* to, P place, int n) {
        const B bytes = __builtin_convertvector(place, B);
        if (n == N) __builtin_memcpy(to, &bytes, N);
        else __builtin_memcpy(to, &bytes, n);
    }
    template <class T>
    static FR_INLINE V load_from(const T* from, int n) { return load<V>(from, n); }
    template <class T>
    static FR_INLINE void store_to(T* to, V v, int n) { store(to, v, n); }
};
template <>
struct Place<F32> : VectorPlace<F32, I32, U8x16, 16> {};
template <>
struct Place<F64> : VectorPlace<F64, I64, U8x8, 8> {};
template <class S, class V>
struct ScalarPlace {
    using places = int32_t;
    static constexpr int lanes = 1;
    static FR_INLINE int32_t every(int64_t value) { return int32_t(value); }
    static FR_INLINE int32_t read(const uint8_t* from, int) { return *from; }
    static FR_INLINE void write(uint8_t* to, int32_t place, int) { *to = uint8_t(place); }
    template <class T>
    static FR_INLINE S load_from(const T* from, int) {
        if constexpr (sizeof(T) == sizeof(S)) return *from;
        else return load<V>(from, 1)[0];
    }
    template <class T>
    static FR_INLINE void store_to(T* to, S v, int) {
        if constexpr (sizeof(T) == sizeof(S)) *to = v;
        else store(to, V{} + v, 1);
    }
};
template <>
struct Place<float> : ScalarPlace<float, F32> {};
template <>
struct Place<double> : ScalarPlace<double, F64> {};

// The element at (image, h, w) of an image; `image` counts planes for NCHW.
FR_INLINE int64_t pixel(const Layout& l, int64_t image, int64_t h, int64_t w, int64_t height, int64_t width) {
    return ((image * height + h) * width + w) * (l.plane ? 1 : l.channels);
}

// Windows o with o*stride - padding <= i < o*stride - padding + kernel.
struct Span {
    int64_t first, last;
};
FR_INLINE Span windows(int64_t i, int64_t kernel, int64_t stride, int64_t padding, int64_t count) {
    const int64_t up = i + padding, last = up / stride;
    return {up < kernel ? 0 : (up - kernel) / stride + 1, last < count ? last : count - 1};
}

template <class V, class T, class O, class K>
FR_INLINE void pool_rows(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using Q = Place<V>;
    using P = typename Q::places;
    using S = typename Lanes<T>::scalar;
    const V p = splat<V>(a.act_param), lowest = splat<V>(-__builtin_inf());
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    const S* scale = static_cast<const S*>(a.norm.scale);
    const S* shift = static_cast<const S*>(a.norm.shift);
    const int64_t lanes = a.layout.plane ? 1 : a.layout.channels;
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / q.out_height, oh = row % q.out_height, top = oh * q.stride[0] - q.padding[0];
        const int64_t plane_channel = a.layout.plane ? image % a.layout.channels : 0;
        for (int64_t ow = 0; ow < q.out_width; ow++) {
            const int64_t left = ow * q.stride[1] - q.padding[1];
            const int64_t to = pixel(a.layout, image, oh, ow, q.out_height, q.out_width);
            for (int64_t c = 0; c < lanes; c += Q::lanes) {
                const int n = lanes - c < Q::lanes ? int(lanes - c) : Q::lanes;
                const V s = Q::load_from(scale + plane_channel + c, n), t = Q::load_from(shift + plane_channel + c, n);
                V best = lowest;
                P place = Q::every(-1);
                for (int64_t i = top < 0 ? -top : 0; i < q.kernel[0] && top + i < q.height; i++)
                    for (int64_t j = left < 0 ? -left : 0; j < q.kernel[1] && left + j < q.width; j++) {
                        const int64_t from = pixel(a.layout, image, top + i, left + j, q.height, q.width) + c;
                        const V v = k.forward(affine(Q::load_from(y + from, n), s, t), p);
                        // as ATen: a NaN takes the place, and the first pixel does when all are -inf
                        const auto take = (v > best) | (v != v) | (place < Q::every(0));
                        best = take ? v : best;
                        place = take ? Q::every(i * q.kernel[1] + j) : place;
                    }
                Q::store_to(out + to + c, best, n);
                Q::write(q.argmax + to + c, place, n);
            }
        }
    }
}

// Gathers instead of scattering: a pixel asks every window that covers it. sums[..][C] is this range's.
template <class V, class T, class G, class K>
FR_INLINE void pool_rows_backward(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using Q = Place<V>;
    using S = typename Lanes<T>::scalar;
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    const T* grad = static_cast<const T*>(a.grad);
    G* out = static_cast<G*>(a.out);
    const S* scale = static_cast<const S*>(a.norm.scale);
    const S* shift = static_cast<const S*>(a.norm.shift);
    const S* center = static_cast<const S*>(a.norm.center);
    S* s0 = static_cast<S*>(a.sums[0]);
    S* s1 = static_cast<S*>(a.sums[1]);
    for (int64_t c = 0; c < a.layout.channels; c++) s0[c] = s1[c] = 0;
    const int64_t lanes = a.layout.plane ? 1 : a.layout.channels;
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / q.height, h = row % q.height;
        const int64_t plane_channel = a.layout.plane ? image % a.layout.channels : 0;
        const Span rows = windows(h, q.kernel[0], q.stride[0], q.padding[0], q.out_height);
        for (int64_t w = 0; w < q.width; w++) {
            const Span columns = windows(w, q.kernel[1], q.stride[1], q.padding[1], q.out_width);
            const int64_t here = pixel(a.layout, image, h, w, q.height, q.width);
            for (int64_t c = 0; c < lanes; c += Q::lanes) {
                const int n = lanes - c < Q::lanes ? int(lanes - c) : Q::lanes;
                const int64_t channel = plane_channel + c;
                V da{};
                for (int64_t oh = rows.first; oh <= rows.last; oh++)
                    for (int64_t ow = columns.first; ow <= columns.last; ow++) {
                        const int64_t from = pixel(a.layout, image, oh, ow, q.out_height, q.out_width) + c;
                        const int64_t place = (h + q.padding[0] - oh * q.stride[0]) * q.kernel[1] + w + q.padding[1] -
                                              ow * q.stride[1];
                        const V g = Q::load_from(grad + from, n);
                        da = da + (Q::read(q.argmax + from, n) == Q::every(place) ? g : V{});
                    }
                const V v = Q::load_from(y + here + c, n);
                const V z = affine(v, Q::load_from(scale + channel, n), Q::load_from(shift + channel, n));
                const V dz = k.backward(da, z, p);
                Q::store_to(out + here + c, dz, n);
                Q::store_to(s0 + channel, Q::load_from(s0 + channel, n) + dz, n);
                Q::store_to(s1 + channel, Q::load_from(s1 + channel, n) + dz * (v - Q::load_from(center + channel, n)), n);
            }
        }
    }
}

template <class T, class O, class K>
void bn_act_max_pool_impl(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    if (a.layout.plane) pool_rows<typename Lanes<T>::scalar, T, O, K>(a, q, begin, end);
    else pool_rows<typename Lanes<T>::vector, T, O, K>(a, q, begin, end);
}
template <class T, class G, class K>
void bn_act_max_pool_backward_impl(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    if (a.layout.plane) pool_rows_backward<typename Lanes<T>::scalar, T, G, K>(a, q, begin, end);
    else pool_rows_backward<typename Lanes<T>::vector, T, G, K>(a, q, begin, end);
}

// ------------------------------------------------------------------------------------------- Winograd F(2x2, 3x3)
// Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), section 4.1.
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

// ------------------------------------------------------------------------------------------- from types to templates
template <class T>
struct Tag {
    using type = T;
};

template <class F>
FR_INLINE void by_types(DType y, DType other, F f) {
    if (y == DType::f64) return f(Tag<double>{}, Tag<double>{});
    if (y == DType::f32) return f(Tag<float>{}, Tag<float>{});
    if (y == DType::bf16 && other == DType::f32) return f(Tag<bf16>{}, Tag<float>{});
    if (y == DType::bf16) return f(Tag<bf16>{}, Tag<bf16>{});
    if (other == DType::f32) return f(Tag<_Float16>{}, Tag<float>{});
    f(Tag<_Float16>{}, Tag<_Float16>{});
}

// identity and relu get loops of their own; the others are told apart inside the loop, where the exp costs more.
template <Act A>
struct Fixed {
    FR_INLINE explicit Fixed(Act) {}
    template <class V>
    FR_INLINE V forward(V z, V p) const { return act<A>(z, p); }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const { return act_backward<A>(g, z, p); }
};
struct Chosen {
    Act chosen;
    FR_INLINE explicit Chosen(Act a) : chosen(a) {}
    template <class F>
    FR_INLINE auto with(F f) const {
        switch (chosen) {
            case Act::leaky_relu: return f(Fixed<Act::leaky_relu>(chosen));
            case Act::elu: return f(Fixed<Act::elu>(chosen));
            case Act::sigmoid: return f(Fixed<Act::sigmoid>(chosen));
            case Act::silu: return f(Fixed<Act::silu>(chosen));
            case Act::relu6: return f(Fixed<Act::relu6>(chosen));
            case Act::hardswish: return f(Fixed<Act::hardswish>(chosen));
            default: return f(Fixed<Act::identity>(chosen));
        }
    }
    template <class V>
    FR_INLINE V forward(V z, V p) const {
        return with([&](auto k) __attribute__((always_inline)) { return k.forward(z, p); });
    }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const {
        return with([&](auto k) __attribute__((always_inline)) { return k.backward(g, z, p); });
    }
};

template <class F>
FR_INLINE void by_act(Act a, F f) {
    if (a == Act::identity) return f(Tag<Fixed<Act::identity>>{});
    if (a == Act::relu) return f(Tag<Fixed<Act::relu>>{});
    f(Tag<Chosen>{});
}

void bn_act_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, begin, end);
        });
    });
}
void bn_act_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_backward_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, begin, end);
        });
    });
}
void bn_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        bn_backward_impl<typename decltype(t)::type, typename decltype(o)::type>(a, begin, end);
    });
}
void moments_any(const Args& a, int64_t begin, int64_t end) {
    if (a.y_type == DType::f32 && a.other_type == DType::bf16) return moments_impl<float, bf16>(a, begin, end);
    if (a.y_type == DType::f32 && a.other_type == DType::f16) return moments_impl<float, _Float16>(a, begin, end);
    if (a.y_type == DType::f64) return moments_impl<double, double>(a, begin, end);
    if (a.y_type == DType::f32) return moments_impl<float, float>(a, begin, end);
    if (a.y_type == DType::bf16) return moments_impl<bf16, bf16>(a, begin, end);
    moments_impl<_Float16, _Float16>(a, begin, end);
}
void bn_act_max_pool_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, q, begin, end);
        });
    });
}
void bn_act_max_pool_backward_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_backward_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, q, begin, end);
        });
    });
}

template <class F>
FR_INLINE void by_float_type(DType t, F f) {
    if (t == DType::bf16) return f(Tag<bf16>{});
    if (t == DType::f16) return f(Tag<_Float16>{});
    f(Tag<float>{});
}
void winograd_input_any(const Args& a, const Winograd& q, float* v, int64_t begin, int64_t end) {
    by_float_type(a.y_type, [&](auto t) {
        by_act(a.act, [&](auto k) {
            winograd_input_impl<typename decltype(t)::type, typename decltype(k)::type>(a, q, v, begin, end);
        });
    });
}
void winograd_output_any(const Args& a, const Winograd& q, const float* m, int64_t begin, int64_t end) {
    by_float_type(a.other_type, [&](auto t) {
        by_act(a.act, [&](auto k) {
            winograd_output_impl<typename decltype(t)::type, typename decltype(k)::type>(a, q, m, begin, end);
        });
    });
}

}  // namespace
