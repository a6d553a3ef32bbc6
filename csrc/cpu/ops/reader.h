// What the specs of rows and of frozen rows have in common.
#pragma once

#include <array>

#include "ops.h"

namespace fused_resnet::cpu {

// What a vector holds.
template <class T>
List<T> values(const char* name, const Tensor& t, ScalarType type) {
    FR_CHECK(t.scalar_type() == type && t.dim() == 1 && t.is_contiguous(), name, ": expected a vector in ", type);
    return List<T>(static_cast<const T*>(t.data_ptr()), size_t(t.numel()));
}

// Reads numbers in the order in which fused_resnet/backends/cpu.py and cpu_steps.py write them.
class Reader {
    IntList ints;
    List<double> reals;
    size_t i = 0, r = 0;

  public:
    Reader(const Tensor& ints, const Tensor& reals)
        : ints(values<int64_t>("ints", ints, ScalarType::Long)),
          reals(values<double>("reals", reals, ScalarType::Double)) {}

    int64_t next() {
        FR_CHECK(i < ints.size(), "the spec ends after ", ints.size(), " integers");
        return ints[i++];
    }
    double real() {
        FR_CHECK(r < reals.size(), "the spec ends after ", reals.size(), " real numbers");
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
        return call("aten::avg_pool2d", t, IntList(kernel), IntList(stride), IntList(padding), ceil_mode,
                    count_include_pad, std::optional<int64_t>())[0];
    }
    Tensor average_backward(const Tensor& dout, const Tensor& t) const {
        return call("aten::avg_pool2d_backward", dout, t, IntList(kernel), IntList(stride), IntList(padding), ceil_mode,
                    count_include_pad, std::optional<int64_t>())[0];
    }
};

// Every stride-th pixel of t; t with zeros as its last channels.
inline Tensor every(const Tensor& t, IntList stride) { return t.every(2, stride[0]).every(3, stride[1]); }
inline Tensor padded(const Tensor& t, int64_t channels, MemoryFormat format) {
    const Tensor to = zeros({t.size(0), channels, t.size(2), t.size(3)}, t.options(), format);
    copy(to.narrow(1, t.size(1)), t);
    return to;
}

}  // namespace fused_resnet::cpu
