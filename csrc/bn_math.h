// Every formula of a chain, once, for a scalar or a vector of lanes, on host and device.
//
// T is float, double, or a GCC vector of either: arithmetic, comparisons and ?: have the same meaning for all.
//     z = s y + t (+ residual)         a = act(z)         dz = g act'(z)
//     dy = A dz + B (y - mu) + C       (count, mean, M2) of two halves, merged by Chan's formula
//     s, t of z and A, B, C of dy from BatchNorm's statistics, weights and sums
// act and act' send NaN and the kinks where ATen's operators do (relu, threshold_backward, hardtanh_backward ...).
// No finite z overflows to NaN where ATen's operators have a number.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FR_INLINE __host__ __device__ __forceinline__
#else
#define FR_INLINE inline __attribute__((always_inline))
#endif

namespace fused_resnet {

// X(name) for every activation, in the order of ACTIVATIONS in fused_resnet/base/activations.py. The kernels for CPUs
// inline the common ones and call the others.
#define FR_COMMON_ACTS(X) X(identity) X(relu) X(leaky_relu) X(elu) X(sigmoid) X(silu) X(relu6) X(hardswish)
#define FR_OTHER_ACTS(X) X(gelu) X(gelu_tanh) X(mish) X(softplus) X(tanh) X(hardsigmoid) X(hardtanh) X(selu) X(celu)
#define FR_ACTS(X) FR_COMMON_ACTS(X) FR_OTHER_ACTS(X)

#define FR_ENUMERATOR(name) name,
enum class Act : int { FR_ACTS(FR_ENUMERATOR) };
#undef FR_ENUMERATOR
#define FR_ONE_MORE(name) +1
constexpr int kActs = 0 FR_ACTS(FR_ONE_MORE);
#undef FR_ONE_MORE

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

// The standard normal distribution's Phi(z) = erfc(-z/sqrt(2))/2. Unlike (1 + erf)/2 it keeps its digits at z << 0.
template <class T>
struct NormalCdf;
template <>
struct NormalCdf<float> {
    static FR_INLINE float of(float z) { return 0.5f * ::erfcf(-0.707106781186547524f * z); }
};
template <>
struct NormalCdf<double> {
    static FR_INLINE double of(double z) { return 0.5 * ::erfc(-0.707106781186547524 * z); }
};

// log(1 + q) of 0 <= q <= 1
template <class T>
struct Log1p;
template <>
struct Log1p<float> {
    static FR_INLINE float of(float q) { return ::log1pf(q); }
};
template <>
struct Log1p<double> {
    static FR_INLINE double of(double q) { return ::log1p(q); }
};

template <class T>
struct Tanh;
template <>
struct Tanh<float> {
    static FR_INLINE float of(float x) { return ::tanhf(x); }
};
template <>
struct Tanh<double> {
    static FR_INLINE double of(double x) { return ::tanh(x); }
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

// z between two limits, and the gradient g between them: none at either limit.
template <class T>
FR_INLINE T clamp(T z, T low, T high) {
    return z < low ? low : (z > high ? high : z);
}
template <class T>
FR_INLINE T clamp_backward(T g, T z, T low, T high) {
    return z <= low ? splat<T>(0) : (z >= high ? splat<T>(0) : g);
}

// a (exp(z b) - 1) below 0, z c above: elu, selu, celu.
template <class T>
FR_INLINE T exponential_linear(T z, T a, T b, T c) {
    return z <= splat<T>(0) ? a * (Exponential<T>::of(z * b) - splat<T>(1)) : z * c;
}
template <class T>
FR_INLINE T exponential_linear_backward(T g, T z, T a, T b, T c) {
    return z > splat<T>(0) ? g * c : g * a * b * Exponential<T>::of(z * b);
}
// of selu (Klambauer et al. 2017)
constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;

// The normal distribution's density.
template <class T>
FR_INLINE T normal_density(T z) {
    return splat<T>(0.398942280401432678) * Exponential<T>::of(z * z * splat<T>(-0.5));
}

// gelu's approximation z (1 + tanh(v))/2 = z sigmoid(2 v), v = sqrt(2/pi) (z + 0.044715 z^3): 2 v and its derivative.
constexpr double kGeluScale = 1.59576912160573072, kGeluCubic = 0.044715;
template <class T>
FR_INLINE T gelu_tanh_argument(T z) {
    return splat<T>(kGeluScale) * z * (splat<T>(1) + splat<T>(kGeluCubic) * z * z);
}
template <class T>
FR_INLINE T gelu_tanh_slope(T z) {
    return splat<T>(kGeluScale) * (splat<T>(1) + splat<T>(3 * kGeluCubic) * z * z);
}

// tanh(softplus(z)) = n / (n + 2) with n = e (e + 2), e = exp(z), and its derivative 4 e (1 + e) / (n + 2)^2. At z > 0
// numerators and denominators are those times q^2 and q^4, q = exp(-z), so that nothing overflows.
template <class T>
struct MishGate {
    T value, slope;

    FR_INLINE explicit MishGate(T z) {
        const T one = splat<T>(1), two = splat<T>(2);
        const T q = Exponential<T>::of(z > splat<T>(0) ? -z : z), square = q * q;
        const T n = z > splat<T>(0) ? one + two * q : square + two * q;
        const T total = n + two * (z > splat<T>(0) ? square : one);
        value = n / total;
        slope = splat<T>(4) * (z > splat<T>(0) ? square : q) * (one + q) / (total * total);
    }
};

// From here on softplus is z, as in PyTorch.
constexpr double kSoftplusThreshold = 20;

// act(z); p is the activation's parameter (negative_slope, alpha, beta, limit).
template <Act A, class T>
FR_INLINE T act(T z, T p) {
    const T zero = splat<T>(0), one = splat<T>(1), three = splat<T>(3), six = splat<T>(6);
    if constexpr (A == Act::relu) return z < zero ? zero : z;
    if constexpr (A == Act::leaky_relu) return z > zero ? z : z * p;
    if constexpr (A == Act::elu) return exponential_linear(z, p, one, one);
    if constexpr (A == Act::sigmoid) return sigmoid(z);
    if constexpr (A == Act::silu) return times_sigmoid(z, z);
    if constexpr (A == Act::relu6) return clamp(z, zero, six);
    if constexpr (A == Act::hardswish) return z * clamp(z + three, zero, six) / six;
    if constexpr (A == Act::gelu) return z * NormalCdf<T>::of(z);
    if constexpr (A == Act::gelu_tanh) return times_sigmoid(z, gelu_tanh_argument(z));
    if constexpr (A == Act::mish) return z * MishGate<T>(z).value;
    if constexpr (A == Act::softplus) {
        const T x = z * p, q = Exponential<T>::of(x < zero ? x : -x);
        return x > splat<T>(kSoftplusThreshold) ? z : ((x < zero ? zero : x) + Log1p<T>::of(q)) / p;
    }
    if constexpr (A == Act::tanh) return Tanh<T>::of(z);
    if constexpr (A == Act::hardsigmoid) return clamp(z + three, zero, six) / six;
    if constexpr (A == Act::hardtanh) return clamp(z, -p, p);
    if constexpr (A == Act::selu)
        return exponential_linear(z, splat<T>(kSeluScale * kSeluAlpha), one, splat<T>(kSeluScale));
    if constexpr (A == Act::celu) return exponential_linear(z, p, one / p, one);
    return z;
}

// g act'(z).
template <Act A, class T>
FR_INLINE T act_backward(T g, T z, T p) {
    const T zero = splat<T>(0), one = splat<T>(1), three = splat<T>(3), six = splat<T>(6);
    if constexpr (A == Act::relu) return z <= zero ? zero : g;
    if constexpr (A == Act::leaky_relu) return z > zero ? g : g * p;
    if constexpr (A == Act::elu) return exponential_linear_backward(g, z, p, one, one);
    if constexpr (A == Act::sigmoid) {
        const T s = sigmoid(z);
        return g * s * (one - s);
    }
    if constexpr (A == Act::silu) {
        const T s = sigmoid(z);
        return g * s * (one + z * (one - s));
    }
    if constexpr (A == Act::relu6) return clamp_backward(g, z, zero, six);
    if constexpr (A == Act::hardswish) {
        const T slope = z / three + splat<T>(0.5);
        return z <= -three ? zero : (z >= three ? g : g * slope);
    }
    if constexpr (A == Act::gelu) return g * (NormalCdf<T>::of(z) + z * normal_density(z));
    if constexpr (A == Act::gelu_tanh) {
        const T s = sigmoid(gelu_tanh_argument(z));
        return g * (s + z * (s * (one - s)) * gelu_tanh_slope(z));
    }
    if constexpr (A == Act::mish) {
        const MishGate<T> gate(z);
        return g * (gate.value + z * gate.slope);
    }
    if constexpr (A == Act::softplus) {
        const T x = z * p;
        return x > splat<T>(kSoftplusThreshold) ? g : times_sigmoid(g, x);
    }
    if constexpr (A == Act::tanh) {
        const T t = Tanh<T>::of(z);
        return g * (one - t * t);
    }
    if constexpr (A == Act::hardsigmoid) {  // ATen's slope is a float for doubles, too
        const T dz = g * splat<T>(1.f / 6.f);
        return z > -three ? (z < three ? dz : zero) : zero;
    }
    if constexpr (A == Act::hardtanh) return clamp_backward(g, z, -p, p);
    if constexpr (A == Act::selu)
        return exponential_linear_backward(g, z, splat<T>(kSeluScale * kSeluAlpha), one, splat<T>(kSeluScale));
    if constexpr (A == Act::celu) return exponential_linear_backward(g, z, p, one / p, one);
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
