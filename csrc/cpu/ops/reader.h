// What the specs of rows and of frozen rows have in common.
#pragma once

#include <array>

#include "ops.h"

namespace fused_resnet::cpu {

// Reads numbers in the order in which fused_resnet/backends/cpu.py and cpu_steps.py write them.
struct Reader {
    IntList ints;
    at::ArrayRef<double> reals;
    size_t i = 0, r = 0;

    int64_t next() {
        TORCH_CHECK(i < ints.size(), "the spec ends after ", ints.size(), " integers");
        return ints[i++];
    }
    double real() {
        TORCH_CHECK(r < reals.size(), "the spec ends after ", reals.size(), " real numbers");
        return reals[r++];
    }
    std::array<int64_t, 2> pair() {
        const int64_t first = next();
        return {first, next()};
    }
};

struct Window {
    std::array<int64_t, 2> kernel, stride, padding;
    bool ceil_mode, count_include_pad;

    static std::optional<Window> read(Reader& from) {
        if (!from.next()) return std::nullopt;
        Window w{from.pair(), from.pair(), from.pair(), false, false};
        w.ceil_mode = from.next();
        w.count_include_pad = from.next();
        return w;
    }
    Tensor average(const Tensor& t) const {
        return at::avg_pool2d(t, kernel, stride, padding, ceil_mode, count_include_pad);
    }
};

// Every stride-th pixel of t; t with zeros as its last channels.
inline Tensor every(const Tensor& t, IntList stride) {
    return t.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]);
}
inline Tensor padded(const Tensor& t, int64_t channels) {
    return at::constant_pad_nd(t, {0, 0, 0, 0, 0, channels - t.size(1)});
}

}  // namespace fused_resnet::cpu
