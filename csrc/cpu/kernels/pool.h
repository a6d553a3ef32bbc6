// The stem's tail: bn_act and the max-pool after it, forward and backward.
#pragma once

#include "../../pool_math.h"
#include "vectors.h"

namespace {

typedef uint8_t U8 __attribute__((vector_size(kLanes)));
typedef uint8_t U8Half __attribute__((vector_size(kLanes / 2)));
typedef int64_t I64 __attribute__((vector_size(FR_VECTOR_BYTES)));

// The places of maxima in their windows, beside a vector of values.
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
};
template <>
struct Place<F32> : VectorPlace<F32, I32, U8, kLanes> {};
template <>
struct Place<F64> : VectorPlace<F64, I64, U8Half, kLanes / 2> {};
// ---------------------------------------------------------------------------------------------------- channels_last
FR_INLINE int64_t pixel(int64_t image, int64_t h, int64_t w, int64_t height, int64_t width, int64_t channels) {
    return ((image * height + h) * width + w) * channels;
}

template <class T, class O, class K>
FR_INLINE void pool_pixels(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    using Q = Place<V>;
    using P = typename Q::places;
    const V p = splat<V>(a.act_param), lowest = splat<V>(-__builtin_inf());
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    const S* scale = static_cast<const S*>(a.norm.scale);
    const S* shift = static_cast<const S*>(a.norm.shift);
    const int64_t C = a.layout.channels;
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / q.out_height, oh = row % q.out_height, top = oh * q.stride[0] - q.padding[0];
        for (int64_t ow = 0; ow < q.out_width; ow++) {
            const int64_t left = ow * q.stride[1] - q.padding[1];
            const int64_t to = pixel(image, oh, ow, q.out_height, q.out_width, C);
            for (int64_t c = 0; c < C; c += Q::lanes) {
                const int n = C - c < Q::lanes ? int(C - c) : Q::lanes;
                const V s = load<V>(scale + c, n), t = load<V>(shift + c, n);
                V best = lowest;
                P place = Q::every(-1);
                for (int64_t i = top < 0 ? -top : 0; i < q.kernel[0] && top + i < q.height; i++)
                    for (int64_t j = left < 0 ? -left : 0; j < q.kernel[1] && left + j < q.width; j++) {
                        const int64_t from = pixel(image, top + i, left + j, q.height, q.width, C) + c;
                        const V v = k.forward(affine(load<V>(y + from, n), s, t), p);
                        // as in ATen: a NaN wins, and the first pixel wins if all are -inf
                        const P take = (v > best) | (v != v) | (place < Q::every(0));
                        best = take ? v : best;
                        place = take ? Q::every(i * q.kernel[1] + j) : place;
                    }
                store(out + to + c, best, n);
                Q::write(q.argmax + to + c, place, n);
            }
        }
    }
}

// Gathers instead of scattering: a pixel reads every window that covers it. sums[..][C] are this range's sums.
template <class T, class G, class K>
FR_INLINE void pool_pixels_backward(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    using Q = Place<V>;
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
    const int64_t C = a.layout.channels;
    for (int64_t row = begin; row < end; row++) {
        const int64_t image = row / q.height, h = row % q.height;
        const Span<int64_t> rows = windows(h, q.kernel[0], q.stride[0], q.padding[0], q.out_height);
        for (int64_t w = 0; w < q.width; w++) {
            const Span<int64_t> columns = windows(w, q.kernel[1], q.stride[1], q.padding[1], q.out_width);
            const int64_t here = pixel(image, h, w, q.height, q.width, C);
            for (int64_t c = 0; c < C; c += Q::lanes) {
                const int n = C - c < Q::lanes ? int(C - c) : Q::lanes;
                V da{};
                for (int64_t oh = rows.first; oh <= rows.last; oh++)
                    for (int64_t ow = columns.first; ow <= columns.last; ow++) {
                        const int64_t from = pixel(image, oh, ow, q.out_height, q.out_width, C) + c;
                        const int64_t place =
                            (h + q.padding[0] - oh * q.stride[0]) * q.kernel[1] + w + q.padding[1] - ow * q.stride[1];
                        const V g = load<V>(grad + from, n);
                        da = da + (Q::read(q.argmax + from, n) == Q::every(place) ? g : V{});
                    }
                const V v = load<V>(y + here + c, n);
                const V dz = k.backward(da, affine(v, load<V>(scale + c, n), load<V>(shift + c, n)), p);
                store(out + here + c, dz, n);
                store(s0 + c, load<V>(s0 + c, n) + dz, n);
                store(s1 + c, load<V>(s1 + c, n) + dz * (v - load<V>(center + c, n)), n);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- NCHW
// Columns of a row of a plane that are worked on at a time; more than a window has.
constexpr int64_t kPoolColumns = 512;

// Each column's maximum over the window's rows, a vector of columns at a time; then each window's over its columns.
template <class T, class O, class K>
FR_INLINE void pool_planes(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    using P = typename Place<V>::places;
    constexpr int L = Place<V>::lanes;
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    S highest[kPoolColumns + L];
    decltype(P{}[0] + 0) row_of[kPoolColumns + L];  // of a column's maximum
    const int64_t outputs = (kPoolColumns - q.kernel[1]) / q.stride[1] + 1;
    for (int64_t row = begin; row < end; row++) {
        const int64_t plane = row / q.out_height, oh = row % q.out_height, top = oh * q.stride[0] - q.padding[0];
        const int64_t channel = plane % a.layout.channels, first_row = top < 0 ? -top : 0;
        const int64_t last_row = top + q.kernel[0] < q.height ? q.kernel[0] : q.height - top;
        const V s = at<V, S>(a.norm.scale, channel, L, true), t = at<V, S>(a.norm.shift, channel, L, true);
        const T* y = static_cast<const T*>(a.y) + (plane * q.height + top) * q.width;
        for (int64_t ow = 0; ow < q.out_width; ow += outputs) {
            const int64_t last_out = ow + outputs < q.out_width ? ow + outputs : q.out_width;
            const int64_t left = ow * q.stride[1] - q.padding[1],
                          right = (last_out - 1) * q.stride[1] - q.padding[1] + q.kernel[1];
            const int64_t first = left < 0 ? 0 : left, last = right < q.width ? right : q.width;
            for (int64_t w = first; w < last; w += L) {
                const int n = last - w < L ? int(last - w) : L;
                V best = splat<V>(-__builtin_inf());
                P place = Place<V>::every(-1);
                for (int64_t i = first_row; i < last_row; i++) {
                    const V v = k.forward(affine(load<V>(y + i * q.width + w, n), s, t), p);
                    const P take = (v > best) | (v != v) | (place < Place<V>::every(0));
                    best = take ? v : best;
                    place = take ? Place<V>::every(i) : place;
                }
                __builtin_memcpy(highest + w - first, &best, sizeof best);
                __builtin_memcpy(row_of + w - first, &place, sizeof place);
            }
            for (int64_t o = ow; o < last_out; o++) {
                const int64_t from = o * q.stride[1] - q.padding[1];
                S best = -__builtin_inf();
                int64_t place = -1;
                for (int64_t j = from < 0 ? -from : 0; j < q.kernel[1] && from + j < q.width; j++) {
                    const S v = highest[from + j - first];
                    const int64_t here = row_of[from + j - first] * q.kernel[1] + j;
                    // as ATen, which goes by rows: the first of equals, the last NaN
                    const bool nan = v != v,
                               takes = nan ? best == best || here > place : v > best || (v == best && here < place);
                    if (takes || place < 0) best = v, place = here;
                }
                const int64_t to = row * q.out_width + o;
                store_value(static_cast<O*>(a.out) + to, best);
                q.argmax[to] = uint8_t(place);
            }
        }
    }
}

// Scatters the windows' gradients into a row of the plane. sums[..][C] is this range's.
template <class T, class G, class K>
FR_INLINE void pool_planes_backward(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = Place<V>::lanes;
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const T* grad = static_cast<const T*>(a.grad);
    S da[kPoolColumns + L];
    for (int64_t row = begin; row < end; row++) {
        const int64_t plane = row / q.height, h = row % q.height, channel = plane % a.layout.channels;
        const V s = at<V, S>(a.norm.scale, channel, L, true), t = at<V, S>(a.norm.shift, channel, L, true);
        const V center = at<V, S>(a.norm.center, channel, L, true);
        const Span<int64_t> rows = windows(h, q.kernel[0], q.stride[0], q.padding[0], q.out_height);
        V sum{}, sum_y{};
        for (int64_t first = 0; first < q.width; first += kPoolColumns) {
            const int64_t last = first + kPoolColumns < q.width ? first + kPoolColumns : q.width;
            __builtin_memset(da, 0, sizeof da);
            const int64_t left = windows(first, q.kernel[1], q.stride[1], q.padding[1], q.out_width).first;
            const int64_t right = windows(last - 1, q.kernel[1], q.stride[1], q.padding[1], q.out_width).last;
            for (int64_t oh = rows.first; oh <= rows.last; oh++) {
                const int64_t places =
                    (h + q.padding[0] - oh * q.stride[0]) * q.kernel[1];  // of this row in the window
                const int64_t windows_row = (plane * q.out_height + oh) * q.out_width;
                for (int64_t ow = left; ow <= right; ow++) {
                    const int64_t j = q.argmax[windows_row + ow] - places, w = ow * q.stride[1] - q.padding[1] + j;
                    if (j >= 0 && j < q.kernel[1] && w >= first && w < last)
                        da[w - first] += load_value<S>(grad + windows_row + ow);
                }
            }
            for (int64_t w = first; w < last; w += L) {
                const int n = last - w < L ? int(last - w) : L;
                const int64_t off = row * q.width + w;
                const V v = load<V>(static_cast<const T*>(a.y) + off, n);
                V dz = k.backward(load<V>(da + w - first, L), affine(v, s, t), p);
                store(static_cast<G*>(a.out) + off, dz, n);
                if (n == L) sum = sum + dz, sum_y = sum_y + dz * (v - center);
                else
                    for (int l = 0; l < n; l++) sum[l] += dz[l], sum_y[l] += dz[l] * (v[l] - center[l]);
            }
        }
        static_cast<S*>(a.sums[0])[channel] += total(sum, L);
        static_cast<S*>(a.sums[1])[channel] += total(sum_y, L);
    }
}

// ---------------------------------------------------------------------------------------------------- both
template <class T, class O, class K>
void bn_act_max_pool_impl(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    if (a.layout.plane) pool_planes<T, O, K>(a, q, begin, end);
    else pool_pixels<T, O, K>(a, q, begin, end);
}
template <class T, class G, class K>
void bn_act_max_pool_backward_impl(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    using S = typename Lanes<T>::scalar;
    for (int64_t c = 0; c < a.layout.channels; c++) static_cast<S*>(a.sums[0])[c] = static_cast<S*>(a.sums[1])[c] = 0;
    if (a.layout.plane) pool_planes_backward<T, G, K>(a, q, begin, end);
    else pool_pixels_backward<T, G, K>(a, q, begin, end);
}

}  // namespace
