// The parts of every kernel here: vectors of lanes, 16-byte accesses, and the launch.
//
// The same source runs on a CPU: without nvcc, cuda_on_cpu.h (tests/support/cuda_on_cpu) stands in for CUDA's headers.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FR_SHARED(S, name)                                           \
    extern __shared__ __align__(16) unsigned char name##_of_block[]; \
    S* const name = reinterpret_cast<S*>(name##_of_block)
#else
#include "cuda_on_cpu.h"
#endif

#include "acts.cuh"

namespace fused_resnet::cuda {

#ifdef __CUDACC__
// Starts a kernel on a grid. An empty grid is not an error.
template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, Stream stream, const A&... args) {
    if (grid.x == 0 || grid.y == 0) return nullptr;
    kernel<<<grid, threads, shared, stream>>>(args...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors of the current device.
inline int processors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}
#endif

constexpr int kThreads = 128;

// ------------------------------------------------------------------------------------------------ lanes
// The type in which a T is computed.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V values of neighbouring channels, with the arithmetic that bn_math.h needs.
template <class A, int V>
struct Lanes {
    A v[V];
    FR_INLINE A& operator[](int i) { return v[i]; }
    FR_INLINE const A& operator[](int i) const { return v[i]; }
};
#define FR_LANES_OPERATOR(op)                                                       \
    template <class A, int V>                                                       \
    FR_INLINE Lanes<A, V> operator op(const Lanes<A, V>& a, const Lanes<A, V>& b) { \
        Lanes<A, V> to;                                                             \
        _Pragma("unroll") for (int i = 0; i < V; i++) to[i] = a[i] op b[i];         \
        return to;                                                                  \
    }
FR_LANES_OPERATOR(+)
FR_LANES_OPERATOR(-)
FR_LANES_OPERATOR(*)
#undef FR_LANES_OPERATOR
// bn_math.h's splat adds a scalar to zeros
template <class A, int V>
FR_INLINE Lanes<A, V> operator+(const Lanes<A, V>&, A b) {
    Lanes<A, V> to;
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = b;
    return to;
}

// ------------------------------------------------------------------------------------------------ memory
// V elements of T as one access.
template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
    using type = uint4;
};
template <>
struct WordOf<8> {
    using type = unsigned long long;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<1> {
    using type = unsigned char;
};
template <class T, int V>
using Word = typename WordOf<sizeof(T) * V>::type;

template <class T, int V>
__device__ __forceinline__ Word<T, V> fetch(const T* from) {
    return __ldg(reinterpret_cast<const Word<T, V>*>(from));
}

template <class T, int V>
__device__ __forceinline__ Lanes<Wide<T>, V> widen(Word<T, V> word) {
    Lanes<Wide<T>, V> to;
    T narrow[V];
    memcpy(narrow, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < V; i++) {
        if constexpr (std::is_same_v<T, __nv_bfloat16>) to[i] = __bfloat162float(narrow[i]);
        else if constexpr (std::is_same_v<T, __half>) to[i] = __half2float(narrow[i]);
        else to[i] = narrow[i];
    }
    return to;
}

// Rounded to nearest even.
template <class T, int V>
__device__ __forceinline__ void store(T* to, const Lanes<Wide<T>, V>& value) {
    Word<T, V> word;
    if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {
        __nv_bfloat162 pairs[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) pairs[i] = __floats2bfloat162_rn(value[2 * i], value[2 * i + 1]);
        memcpy(&word, pairs, sizeof(word));
    } else if constexpr (std::is_same_v<T, __half> && V > 1) {
        __half2 pairs[V / 2];
#pragma unroll
        for (int i = 0; i < V / 2; i++) pairs[i] = __floats2half2_rn(value[2 * i], value[2 * i + 1]);
        memcpy(&word, pairs, sizeof(word));
    } else {
        T narrow[V];
#pragma unroll
        for (int i = 0; i < V; i++) {
            if constexpr (std::is_same_v<T, __nv_bfloat16>) narrow[i] = __float2bfloat16_rn(value[i]);
            else if constexpr (std::is_same_v<T, __half>) narrow[i] = __float2half_rn(value[i]);
            else narrow[i] = value[i];
        }
        memcpy(&word, narrow, sizeof(word));
    }
    *reinterpret_cast<Word<T, V>*>(to) = word;
}

// Channels c .. c+V-1 of a vector; zeros if it is null or shorter. Loads elements one by one, once, at any address.
template <class A, int V>
__device__ __forceinline__ Lanes<A, V> vector(const void* from, int64_t c, int64_t channels) {
    Lanes<A, V> to{};
    if (from != nullptr && c < channels) {
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = __ldg(static_cast<const A*>(from) + c + i);
    }
    return to;
}

// ------------------------------------------------------------------------------------------------ choices
template <class T>
struct Type {
    using type = T;
};

template <class Body>
Status with_type(DType dtype, Body body) {
    switch (dtype) {
        case DType::f64: return body(Type<double>{});
        case DType::f32: return body(Type<float>{});
        case DType::bf16: return body(Type<__nv_bfloat16>{});
        case DType::f16: return body(Type<__half>{});
    }
    return "no such dtype";
}

inline int bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Elements per access: 16 bytes if every row of every tensor starts at a multiple of 16, otherwise one element.
inline int lanes_of(DType dtype, int64_t channels, std::initializer_list<const void*> tensors) {
    const int lanes = 16 / bytes_of(dtype);
    bool aligned = channels % lanes == 0;
    for (const void* t : tensors) aligned &= reinterpret_cast<uintptr_t>(t) % 16 == 0;
    return aligned ? lanes : 1;
}

// body(Type<T>, integral_constant of lanes)
template <class Body>
Status with_lanes(DType dtype, int lanes, Body body) {
    return with_type(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        if (lanes > 1) return body(type, std::integral_constant<int, 16 / sizeof(T)>{});
        return body(type, std::integral_constant<int, 1>{});
    });
}

// act(z) and g act'(z), lane by lane. act is the same for all threads, so the branch costs almost nothing beside
// memory, and one kernel serves all activations.
template <class A, int V>
__device__ __forceinline__ Lanes<A, V> activate(Act act, Lanes<A, V> z, A p) {
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < V; i++) z[i] = f(z[i]);
        return z;
    };
    switch (act) {
#define FR_CASE(name) \
    case Act::name: return each([&](A v) { return fused_resnet::act<Act::name>(v, p); });
        FR_COMMON_ACTS(FR_CASE)
#undef FR_CASE
        default: return each([&](A v) { return called_act(act, v, p); });
    }
}
template <class A, int V>
__device__ __forceinline__ Lanes<A, V> activate_backward(Act act, Lanes<A, V> g, const Lanes<A, V>& z, A p) {
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < V; i++) g[i] = f(g[i], z[i]);
        return g;
    };
    switch (act) {
#define FR_CASE(name) \
    case Act::name: return each([&](A d, A v) { return act_backward<Act::name>(d, v, p); });
        FR_COMMON_ACTS(FR_CASE)
#undef FR_CASE
        default: return each([&](A d, A v) { return called_act_backward(act, d, v, p); });
    }
}

}  // namespace fused_resnet::cuda
