// Every formula of a chain, once, for a scalar or a vector of lanes, on host and device.
//
// T is float, double, or a GCC vector of either: arithmetic, comparisons and ?: have the same meaning for all.
//     z = s y + t (+ residual)         a = act(z)         dz = g act'(z)
//     dy = A dz + B (y - mu) + C       (count, mean, M2) of two halves, merged by Chan's formula
//     s, t of z and A, B, C of dy from BatchNorm's statistics, weights and sums
// act and act' send NaN and the kinks where ATen's operators do (relu, threshold_backward, hardtanh_backward ...).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FR_INLINE __host__ __device__ __forceinline__
#else
#define FR_INLINE inline __attribute__((always_inline))
#endif

namespace fused_resnet {

// The order is that of ACTIVATIONS in fused_resnet/spec.py.
enum class Act : int { identity, relu, leaky_relu, elu, sigmoid, silu, relu6, hardswish };

// A scalar x as a T.
template <class T>
FR_INLINE T splat(double x) {
    return T{} + static_cast<decltype(T{}[0] + 0)>(x);
}
template <>
FR_INLINE float splat<float>(double x) {
    return static_cast<float>(x);
}
template <>
FR_INLINE double splat<double>(double x) {
    return x;
}

// exp; vector types have their own specialisations.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
    static FR_INLINE float of(float x) { return ::expf(x); }
};
template <>
struct Exponential<double> {
    static FR_INLINE double of(double x) { return ::exp(x); }
};

template <class T>
struct SquareRoot;
template <>
struct SquareRoot<float> {
    static FR_INLINE float of(float x) { return ::sqrtf(x); }
};
template <>
struct SquareRoot<double> {
    static FR_INLINE double of(double x) { return ::sqrt(x); }
};

// w times the sigmoid of z with one division: one rounding less than a product with the sigmoid.
template <class T>
FR_INLINE T times_sigmoid(T w, T z) {
    return w / (splat<T>(1) + Exponential<T>::of(-z));
}
template <class T>
FR_INLINE T sigmoid(T z) {
    return times_sigmoid(splat<T>(1), z);
}

// act(z); p is the activation's parameter (negative_slope, alpha).
template <Act A, class T>
FR_INLINE T act(T z, T p) {
    const T zero = splat<T>(0), three = splat<T>(3), six = splat<T>(6);
    if constexpr (A == Act::relu) return z < zero ? zero : z;
    if constexpr (A == Act::leaky_relu) return z > zero ? z : z * p;
    if constexpr (A == Act::elu) return z <= zero ? p * (Exponential<T>::of(z) - splat<T>(1)) : z;
    if constexpr (A == Act::sigmoid) return sigmoid(z);
    if constexpr (A == Act::silu) return times_sigmoid(z, z);
    if constexpr (A == Act::relu6) return z < zero ? zero : (z > six ? six : z);
    if constexpr (A == Act::hardswish) {
        const T u = z + three;
        return z * (u < zero ? zero : (u > six ? six : u)) / six;
    }
    return z;
}

// g act'(z).
template <Act A, class T>
FR_INLINE T act_backward(T g, T z, T p) {
    const T zero = splat<T>(0), one = splat<T>(1), three = splat<T>(3), six = splat<T>(6);
    if constexpr (A == Act::relu) return z <= zero ? zero : g;
    if constexpr (A == Act::leaky_relu) return z > zero ? g : g * p;
    if constexpr (A == Act::elu) return z > zero ? g : g * p * Exponential<T>::of(z);
    if constexpr (A == Act::sigmoid) {
        const T s = sigmoid(z);
        return g * s * (one - s);
    }
    if constexpr (A == Act::silu) {
        const T s = sigmoid(z);
        return g * s * (one + z * (one - s));
    }
    if constexpr (A == Act::relu6) return z <= zero ? zero : (z >= six ? zero : g);
    if constexpr (A == Act::hardswish) {
        const T slope = z / three + splat<T>(0.5);
        return z <= -three ? zero : (z >= three ? g : g * slope);
    }
    return g;
}

// s y + t
template <class T>
FR_INLINE T affine(T y, T scale, T shift) {
    return y * scale + shift;
}

// A dz + B (y - mu) + C
template <class T>
FR_INLINE T bn_backward(T dz, T y, T center, T a, T b, T c) {
    return a * dz + b * (y - center) + c;
}

// z = s y + t of BatchNorm: r = 1/sqrt(var + eps), s = gamma r, t = beta - center s. A convolution's bias is never
// added to y. It is subtracted from the mean instead: center = mean - bias.
template <class T>
struct Fold {
    T scale, shift, center, rstd;
};
template <class T>
FR_INLINE Fold<T> bn_fold(T mean, T var, T gamma, T beta, T conv_bias, T eps) {
    const T center = mean - conv_bias, rstd = splat<T>(1) / SquareRoot<T>::of(var + eps), scale = gamma * rstd;
    return {scale, beta - center * scale, center, rstd};
}

// dgamma = r sum dz (y - mu), and B, C of dy over `count` values (A = s; frozen BatchNorm has no B and C).
template <class T>
struct Coefficients {
    T dgamma, b, c;
};
template <class T>
FR_INLINE Coefficients<T> bn_coefficients(T scale, T rstd, T sum_dz, T sum_dz_y, T count) {
    const T dgamma = rstd * sum_dz_y, share = -scale / count;
    return {dgamma, share * rstd * dgamma, share * sum_dz};
}

// (count, mean, M2) of a set of values, M2 = sum (value - mean)^2. All lanes of a vector T have the same count.
template <class T, class S>
struct Moments {
    S count;
    T mean, m2;

    // Chan, Golub, LeVeque 1979: the moments of the union.
    FR_INLINE void merge(const Moments& other) {
        if (other.count == 0) return;
        const S total = count + other.count;
        const T delta = other.mean - mean;
        mean = mean + delta * splat<T>(other.count / total);
        m2 = m2 + other.m2 + delta * delta * splat<T>(count * (other.count / total));
        count = total;
    }
};

}  // namespace fused_resnet
