// The stem's tail: bn_act and the max-pool behind it, forward and backward.
#pragma once

#include "../../pool_math.h"
#include "vectors.h"

namespace {

typedef uint8_t U8 __attribute__((vector_size(kLanes)));
typedef uint8_t U8Half __attribute__((vector_size(kLanes / 2)));
typedef int64_t I64 __attribute__((vector_size(FR_VECTOR_BYTES)));

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
struct Place<F32> : VectorPlace<F32, I32, U8, kLanes> {};
template <>
struct Place<F64> : VectorPlace<F64, I64, U8Half, kLanes / 2> {};
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
        const Span<int64_t> rows = windows(h, q.kernel[0], q.stride[0], q.padding[0], q.out_height);
        for (int64_t w = 0; w < q.width; w++) {
            const Span<int64_t> columns = windows(w, q.kernel[1], q.stride[1], q.padding[1], q.out_width);
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

}  // namespace
