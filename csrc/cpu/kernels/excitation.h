// Squeeze-and-excitation, channels_last, for inference: sums over pixels, linear layers of one vector, and a factor per
// channel. Source: Hu et al., Squeeze-and-Excitation Networks (arXiv 1709.01507), equations 2 to 4.
#pragma once

#include "activations.h"

namespace {

// Rows that are added up before they are added to the sums.
constexpr int kRowsAtOnce = 4;

template <class T>
void channel_sums_impl(const T* x, int64_t channels, float* sums, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < channels; c++) sums[c] = 0;
    const auto add = [&](int64_t r, auto rows) __attribute__((always_inline)) {
        const T* row = x + r * channels;
        by_lanes(channels, [&](int64_t c, auto n) __attribute__((always_inline)) {
            F32 sum = load<F32>(row + c, n);
            for (int i = 1; i < rows; i++) sum = sum + load<F32>(row + i * channels + c, n);
            store(sums + c, load<F32>(sums + c, n) + sum, n);
        });
    };
    int64_t r = begin;
    for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) add(r, std::integral_constant<int, kRowsAtOnce>{});
    for (; r < end; r++) add(r, std::integral_constant<int, 1>{});
}

void linear_any(const Args& a, const float* weight, int64_t begin, int64_t end) {
    const Chosen act(a.act);
    const F32 p = splat<F32>(a.act_param);
    const float *x = static_cast<const float*>(a.y), *bias = static_cast<const float*>(a.norm.shift);
    for (int64_t k = begin; k < end; k++) {
        const float* const row = weight + k * a.layout.channels;
        F32 sum{};
        by_lanes(a.layout.channels, [&](int64_t c, auto n) __attribute__((always_inline)) {
            sum = sum + load<F32>(x + c, n) * load<F32>(row + c, n);
        });
        store_value(static_cast<float*>(a.out) + k, act.forward(splat<F32>(bias[k] + total(sum, kLanes)), p)[0]);
    }
}

template <class T>
void scale_rows_impl(T* x, int64_t channels, const float* factors, int64_t begin, int64_t end) {
    for (T* row = x + begin * channels; row < x + end * channels; row += channels)
        by_lanes(channels, [&](int64_t c, auto n) __attribute__((always_inline)) {
            store(row + c, load<F32>(row + c, n) * load<F32>(factors + c, n), n);
        });
}

}  // namespace
