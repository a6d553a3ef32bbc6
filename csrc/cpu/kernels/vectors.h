// Vectors of the compiler's own: element types in memory, lanes in float or double, exp. Included after a file's
// `#pragma GCC target`; includes no header of the standard library, whose code, compiled here, could be linked
// elsewhere.
#pragma once

#include "kernels.h"

// Floats in a register: of wider vectors the compiler does comparisons and selections one element at a time.
constexpr int kLanes = FR_VECTOR_BYTES / 4;
typedef float F32 __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef int16_t I16 __attribute__((vector_size(FR_VECTOR_BYTES / 2)));
typedef _Float16 F16 __attribute__((vector_size(FR_VECTOR_BYTES / 2)));

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
        for (int i = 0; i < kLanes / 2; i++) x[i] = __builtin_exp(x[i]);
        return x;
    }
};

// a[0] + x (a[1] + x (a[2] + ...))
template <int N>
FR_INLINE F32 polynomial(const float (&a)[N], F32 x) {
    F32 y = F32{} + a[N - 1];
    for (int i = N - 2; i >= 0; i--) y = y * x + a[i];
    return y;
}
// With t = 1/(1 + 0.35 |z|), Phi(-|z|) = exp(-z^2/2) t Q(t); Q is a minimax fit for |z| < 14.5, relative error 3e-7.
template <>
struct NormalCdf<F32> {
    static FR_INLINE F32 of(F32 z) {
        constexpr float kQ[] = {0.139621308f, 0.139863493f,  0.119821496f, 0.105551493f,  -0.0232094805f,
                                0.15931475f,  -0.255833953f, 0.144028109f, -0.0291572309f};
        const F32 t = 1.f / (1.f + 0.35f * (z < 0.f ? -z : z));
        const F32 tail = Exponential<F32>::of(z * z * -0.5f) * t * polynomial(kQ, t);
        return z < 0.f ? tail : 1.f - tail;
    }
};
template <>
struct NormalCdf<F64> {
    static FR_INLINE F64 of(F64 z) {
        for (int i = 0; i < kLanes / 2; i++) z[i] = NormalCdf<double>::of(z[i]);
        return z;
    }
};
// log(1 + q) = 2 artanh(s) with s = q/(2 + q) <= 1/3: s times a minimax fit in s^2, relative error 3e-7.
template <>
struct Log1p<F32> {
    static FR_INLINE F32 of(F32 q) {
        constexpr float kA[] = {1.f, 0.333331572f, 0.2001246f, 0.139802279f, 0.140895174f};
        const F32 s = q / (2.f + q);
        return (s + s) * polynomial(kA, s * s);
    }
};
template <>
struct Log1p<F64> {
    static FR_INLINE F64 of(F64 q) {
        for (int i = 0; i < kLanes / 2; i++) q[i] = __builtin_log1p(q[i]);
        return q;
    }
};
// Near 0 the polynomial of Cephes tanhf, which keeps the digits that 1 - 2/(exp(2 |x|) + 1) loses there.
template <>
struct Tanh<F32> {
    static FR_INLINE F32 of(F32 x) {
        constexpr float kA[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f,
                                -5.70498872745e-3f};
        const F32 a = x < 0.f ? -x : x, square = x * x;
        const F32 near = x + x * square * polynomial(kA, square), far = 1.f - 2.f / (Exponential<F32>::of(a + a) + 1.f);
        return a < 0.625f ? near : (x < 0.f ? -far : far);
    }
};
template <>
struct Tanh<F64> {
    static FR_INLINE F64 of(F64 x) {
        for (int i = 0; i < kLanes / 2; i++) x[i] = __builtin_tanh(x[i]);
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

// f(0) ... f(N - 1) with constants, so that arrays indexed by them are registers. A loop would be unrolled too late.
template <int N, class F>
FR_INLINE void unrolled(F f) {
    if constexpr (N > 1) unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
}

template <class T>
struct Lanes {  // an element type's vector for computation
    using vector = F32;
    using scalar = float;
};
template <>
struct Lanes<double> {
    using vector = F64;
    using scalar = double;
};

FR_INLINE F32 widen(U16 raw, bf16) { return (F32)(__builtin_convertvector(raw, U32) << 16); }
FR_INLINE U16 narrow(F32 v, bf16) {  // to nearest, ties to even; NaN stays NaN
#ifdef FR_BF16
    constexpr int kDenormal = 0x20;  // the instruction makes them 0
    if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)v, kDenormal), 1)) return (U16)_mm512_cvtneps_pbh((__m512)v);
#endif
    const U32 u = (U32)v;
    const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U32 nan = U32{} + 0x7fc0u;
    return __builtin_convertvector((u & 0x7fffffffu) > (U32{} + 0x7f800000u) ? nan : rounded, U16);
}
// The compiler converts half precision value by value, the processor a vector.
#if FR_VECTOR_BYTES == 64
FR_INLINE F32 widen(U16 raw, _Float16) { return __builtin_ia32_vcvtph2ps512_mask((I16)raw, F32{}, uint16_t(-1), 4); }
FR_INLINE U16 narrow(F32 v, _Float16) { return (U16)__builtin_ia32_vcvtps2ph512_mask(v, 0, I16{}, uint16_t(-1)); }
#elif FR_VECTOR_BYTES == 32
FR_INLINE F32 widen(U16 raw, _Float16) { return __builtin_ia32_vcvtph2ps256((I16)raw); }
FR_INLINE U16 narrow(F32 v, _Float16) { return (U16)__builtin_ia32_vcvtps2ph256(v, 0); }
#else
FR_INLINE F32 widen(U16 raw, _Float16) { return __builtin_convertvector((F16)raw, F32); }
FR_INLINE U16 narrow(F32 v, _Float16) { return (U16) __builtin_convertvector(v, F16); }
#endif

// Part of a vector of floats; AVX does it in one instruction, memcpy of a length that is not known in a call.
#if FR_VECTOR_BYTES == 32
FR_INLINE I32 first_lanes(int n) { return I32{0, 1, 2, 3, 4, 5, 6, 7} < I32{} + n; }
#endif
FR_INLINE F32 load_part(const float* p, int n) {
#if FR_VECTOR_BYTES == 64
    return __builtin_ia32_loadups512_mask(p, F32{}, uint16_t((1u << n) - 1));
#elif FR_VECTOR_BYTES == 32
    return __builtin_ia32_maskloadps256(reinterpret_cast<const F32*>(p), first_lanes(n));
#else
    F32 v{};
    __builtin_memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}
FR_INLINE void store_part(float* p, F32 v, int n) {
#if FR_VECTOR_BYTES == 64
    __builtin_ia32_storeups512_mask(p, v, uint16_t((1u << n) - 1));
#elif FR_VECTOR_BYTES == 32
    __builtin_ia32_maskstoreps256(reinterpret_cast<F32*>(p), first_lanes(n), v);
#else
    __builtin_memcpy(p, &v, n * sizeof(float));
#endif
}

// The same of a vector of 16-bit values.
FR_INLINE U16 load_part(const uint16_t* p, int n) {
#if FR_VECTOR_BYTES == 64
    return (U16)__builtin_ia32_loaddquhi256_mask(reinterpret_cast<const int16_t*>(p), I16{}, uint16_t((1u << n) - 1));
#else
    U16 v{};
    __builtin_memcpy(&v, p, n * sizeof(uint16_t));
    return v;
#endif
}
FR_INLINE void store_part(uint16_t* p, U16 v, int n) {
#if FR_VECTOR_BYTES == 64
    __builtin_ia32_storedquhi256_mask(reinterpret_cast<int16_t*>(p), (I16)v, uint16_t((1u << n) - 1));
#else
    __builtin_memcpy(p, &v, n * sizeof(uint16_t));
#endif
}

// n lanes from p, the others 0.
template <class V, class T>
FR_INLINE V load(const T* p, int n) {
    constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
    if constexpr (std::is_same_v<T, float>) {
        if (n != lanes) return load_part(p, n);
        V v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    } else if constexpr (sizeof(T) == sizeof(V{}[0])) {
        V v{};
        if (n == lanes) __builtin_memcpy(&v, p, sizeof v);
        else __builtin_memcpy(&v, p, n * sizeof(T));
        return v;
    } else {
        if (n != lanes) return widen(load_part(reinterpret_cast<const uint16_t*>(p), n), T{});
        U16 raw;
        __builtin_memcpy(&raw, p, sizeof raw);
        return widen(raw, T{});
    }
}

template <class V, class T>
FR_INLINE void store(T* p, V v, int n) {
    constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
    if constexpr (std::is_same_v<T, float>) {
        if (n != lanes) return store_part(p, v, n);
        __builtin_memcpy(p, &v, sizeof v);
    } else if constexpr (sizeof(T) == sizeof(V{}[0])) {
        if (n == lanes) __builtin_memcpy(p, &v, sizeof v);
        else __builtin_memcpy(p, &v, n * sizeof(T));
    } else {
        const U16 raw = narrow(v, T{});
        if (n != lanes) return store_part(reinterpret_cast<uint16_t*>(p), raw, n);
        __builtin_memcpy(p, &raw, sizeof raw);
    }
}

// f(c, n) for the n channels from every kLanes'th on; n is a constant where all lanes are used.
template <class F>
FR_INLINE void by_lanes(int64_t channels, F f) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) f(c, std::integral_constant<int, kLanes>{});
    if (c < channels) f(c, int(channels - c));
}

// to[i] = from[i]. Few values take a vector or two; of many values memcpy has better ways.
template <class S, class T>
FR_INLINE void copy_by_lanes(const S* from, int64_t count, T* to) {
    by_lanes(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
        if constexpr (std::is_same_v<S, T> && sizeof(T) == sizeof(uint16_t))
            store_part(reinterpret_cast<uint16_t*>(to + i), load_part(reinterpret_cast<const uint16_t*>(from + i), n),
                       n);
        else store(to + i, load<F32>(from + i, n), n);
    });
}
template <class S, class T>
FR_INLINE void copy_values(const S* from, int64_t count, T* to) {
    if constexpr (std::is_same_v<S, T>) __builtin_memcpy(to, from, count * sizeof(T));
    else copy_by_lanes(from, count, to);
}

// One value.
template <class S, class T>
FR_INLINE S load_value(const T* p) {
    if constexpr (sizeof(T) == sizeof(S)) return *p;
    else return load<F32>(p, 1)[0];
}
template <class S, class T>
FR_INLINE void store_value(T* p, S v) {
    if constexpr (sizeof(T) == sizeof(S)) *p = v;
    else store(p, F32{} + v, 1);
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

}  // namespace
