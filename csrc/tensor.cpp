#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <dlfcn.h>

#include <algorithm>

namespace fused_resnet {

namespace {

constexpr size_t kMostDims = 8;
constexpr int64_t kNoOutputPadding[] = {0, 0};
// The dimensions of a channels_last tensor, innermost first.
constexpr int kInnermost[] = {1, 3, 2, 0};

using Dims = std::array<int64_t, kMostDims>;

Dims strides_of(IntList sizes, MemoryFormat format) {
    FR_CHECK(sizes.size() <= kMostDims, "expected at most ", kMostDims, " dimensions, got ", sizes);
    Dims strides;
    int64_t stride = 1;
    const auto set = [&](size_t d) {
        strides[d] = stride;
        stride *= std::max<int64_t>(1, sizes[d]);
    };
    if (format == MemoryFormat::ChannelsLast) std::for_each(kInnermost, kInnermost + 4, set);
    else
        for (size_t d = sizes.size(); d > 0; d--) set(d - 1);
    return strides;
}

Tensor converted(const Tensor& t, ScalarType type, MemoryFormat format) {
    const Tensor to = empty(t.sizes(), t.options().dtype(type), format);
    copy(to, t);
    return to;
}

}  // namespace

void failed(const char* what) {
    // from torch 2.13 on; before, torch prints the reason
    static const auto reason =
        reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
    throw std::runtime_error(reason ? std::string(reason()) : text(what, ": PyTorch raised an error"));
}

bool is_dense(IntList sizes, IntList strides, MemoryFormat format) {
    if (sizes.size() != 4) return false;
    const bool rows = format == MemoryFormat::ChannelsLast;
    if (!rows && std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return true;  // as PyTorch has it
    int64_t expected = 1;
    for (int i = 0; i < 4; i++) {
        const int d = rows ? kInnermost[i] : 3 - i;
        if (sizes[d] == 1) continue;
        if (strides[d] != expected) return false;
        expected *= sizes[d];
    }
    return true;
}

// As PyTorch's suggest_memory_format.
bool Tensor::suggests_channels_last() const {
    const IntList n = sizes(), s = strides();
    if (n.size() != 4 || s[1] == 0) return false;
    int64_t least = 0;
    for (const int d : kInnermost) {
        // the images' stride is a channel's: both orders are right, and NCHW is the usual one
        if (n[d] == 0 || s[d] < least || (d == 0 && least == s[1])) return false;
        least = s[d] * n[d];
    }
    return true;
}

Tensor Tensor::contiguous(MemoryFormat format) const {
    return is_contiguous(format) ? *this : converted(*this, scalar_type(), format);
}

Tensor Tensor::to(ScalarType type) const {
    if (type == scalar_type()) return *this;
    return converted(*this, type, suggests_channels_last() ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor Tensor::clone() const { return made(aoti_torch_clone, "clone", get()); }

Tensor Tensor::view(IntList sizes, IntList strides, int64_t offset) const {
    return made(aoti_torch__reinterpret_tensor, "view", get(), int64_t(sizes.size()), sizes.data(), strides.data(),
                offset);
}

Tensor Tensor::narrow(int64_t d, int64_t length) const {
    std::vector<int64_t> n = sizes().vec();
    n.at(d) = length;
    return view(n, strides());
}

Tensor Tensor::every(int64_t d, int64_t step) const {
    std::vector<int64_t> n = sizes().vec(), s = strides().vec();
    n.at(d) = (n[d] + step - 1) / step;
    s[d] *= step;
    return view(n, s);
}

Tensor empty_strided(IntList sizes, IntList strides, const Options& o) {
    return made(aoti_torch_empty_strided, "empty", int64_t(sizes.size()), sizes.data(), strides.data(),
                static_cast<int32_t>(o.type), o.device, o.index);
}

Tensor empty(IntList sizes, const Options& options, MemoryFormat format) {
    return empty_strided(sizes, {strides_of(sizes, format).data(), sizes.size()}, options);
}

Tensor zeros(IntList sizes, const Options& options, MemoryFormat format) {
    const Tensor t = empty(sizes, options, format);
    check(aoti_torch_zero_(t.get()), "zeros");
    return t;
}

Tensor from_memory(void* data, IntList sizes, IntList strides, ScalarType type) {
    return made(aoti_torch_create_tensor_from_blob, "a matrix", data, int64_t(sizes.size()), sizes.data(),
                strides.data(), int64_t(0), static_cast<int32_t>(type), kCpu, 0);
}

void copy(const Tensor& to, const Tensor& from) { check(aoti_torch_copy_(to.get(), from.get(), 0), "copy"); }

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, IntList stride, IntList padding,
              IntList dilation, int64_t groups) {
    const Profiled step("aten::convolution", {&x, &weight});  // no dispatcher records it
    AtenTensorHandle given = bias ? bias->get() : nullptr;
    return made(aoti_torch_cpu_convolution, "convolution", x.get(), weight.get(), bias ? &given : nullptr,
                stride.data(), int64_t(2), padding.data(), int64_t(2), dilation.data(), int64_t(2), 0, kNoOutputPadding,
                int64_t(2), groups);
}

std::pair<Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, IntList stride,
                                          IntList padding, IntList dilation, int64_t groups, bool need_input,
                                          bool need_weight) {
    const Profiled step("aten::convolution_backward", {&dy, &x, &weight});
    const int32_t needs[] = {need_input, need_weight, 0};
    AtenTensorHandle dx = nullptr, dw = nullptr, dbias = nullptr;
    check(aoti_torch_cpu_convolution_backward(dy.get(), x.get(), weight.get(), nullptr, 0, stride.data(), 2,
                                              padding.data(), 2, dilation.data(), 2, 0, kNoOutputPadding, 2, groups,
                                              needs, 3, &dx, &dw, &dbias),
          "convolution_backward");
    returned(dbias);
    return {returned(dx), returned(dw)};
}

}  // namespace fused_resnet
