// The convolutions of conv.h on tensors. A case that CUTLASS can't take returns no tensor, so that the caller may
// use PyTorch's convolution. An invalid case raises an error.
#include <algorithm>
#include <limits>

#include "conv.h"
#include "tensors.h"

namespace fused_resnet::cuda::ops {

namespace {

struct Kind {
    std::string_view name;
    const char* (*why_not)(const ConvProblem&);
    int (*tiles)(ConvType, ConvTile*);
};
constexpr Kind kFprop{"fprop", conv_fprop_sm90_why_not, conv_fprop_sm90_tiles};
constexpr Kind kDgrad{"dgrad", conv_dgrad_sm90_why_not, conv_dgrad_sm90_tiles};
constexpr Kind kWgrad{"wgrad", conv_wgrad_sm90_why_not, conv_wgrad_sm90_tiles};

const Kind& kind_of(std::string_view name) {
    for (const Kind* kind : {&kFprop, &kDgrad, &kWgrad})
        if (kind->name == name) return *kind;
    FR_CHECK(false, "kind: expected fprop, dgrad or wgrad, got ", name);
}

// The convolution of x [N, C, H, W] by a weight [K, C / groups, R, S] from its sizes, and the reason why CUTLASS can't
// compute it, or null.
struct Sized {
    ConvProblem problem;
    const char* why_not;
};

std::optional<ConvType> type_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16: return ConvType::bf16;
        case ScalarType::Half: return ConvType::f16;
        case ScalarType::Float: return ConvType::tf32;
        default: return std::nullopt;
    }
}

Sized sized(const Kind& kind, ScalarType dtype, IntList x, IntList weight, IntList stride, IntList padding,
            IntList dilation, int64_t groups) {
    FR_CHECK(groups > 0, "groups: expected at least 1, got ", groups);
    FR_CHECK(x.size() == 4, "x: expected [N, C, H, W], got ", x);
    FR_CHECK(weight.size() == 4 && weight[1] * groups == x[1], "weight: expected [K, C / groups, R, S] of x's ", x[1],
             " channels in ", groups, " groups, got ", weight);
    for (int i = 0; i < 2; i++)
        FR_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
                 "conv: expected a stride and dilation of at least 1 and a padding of at least 0, got ", stride, ", ",
                 dilation, " and ", padding);
    const std::optional<ConvType> type = type_of(dtype);
    if (!type) return {{}, "the sm_90 convolutions take bfloat16, float16 and float32"};
    if (groups != 1) return {{}, "the sm_90 convolutions take no groups"};
    for (const IntList sizes : {x, weight, stride, padding, dilation})
        for (const int64_t size : sizes)
            if (size > std::numeric_limits<int>::max()) return {{}, "the sm_90 convolutions take sizes below 2^31"};
    const auto i = [](int64_t size) { return static_cast<int>(size); };
    const ConvProblem g{i(x[0]),       i(x[2]),        i(x[3]),        i(x[1]),      i(weight[0]),
                        i(weight[2]),  i(weight[3]),   i(stride[0]),   i(stride[1]), i(padding[0]),
                        i(padding[1]), i(dilation[0]), i(dilation[1]), *type};
    return {g, kind.why_not(g)};
}

ConvTile tile_of(IntList tile, const ConvProblem& g, const Kind& kind) {
    ConvTile found[kConvTiles];
    const int count = kind.tiles(g.type, found);
    for (int i = 0; i < count; i++)
        if (found[i].m == tile[0] && found[i].n == tile[1]) return found[i];
    FR_CHECK(false, "tile: expected one of conv_tiles, got ", tile);
}

// TMA reads from multiples of 16 bytes. A tensor that begins elsewhere is copied.
Tensor aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : t.clone(); }

// An operand in x's dtype on x's device.
Tensor operand(const char* name, const Tensor& t, const Tensor& x) {
    FR_CHECK(t.options() == x.options(), name, ": expected ", x.options(), ", got ", t.options());
    return aligned(nhwc(name, t));
}

void check(cudaError_t status, const char* op) {
    FR_CHECK(status == cudaSuccess, "fused_resnet_cuda::", op, ": ", cudaGetErrorString(status));
}

}  // namespace

std::optional<std::string> conv_why_not(std::string_view kind, const Tensor& x, const Tensor& weight, IntList stride,
                                        IntList padding, IntList dilation, int64_t groups) {
    const Sized s = sized(kind_of(kind), x.scalar_type(), x.sizes(), weight.sizes(), stride, padding, dilation, groups);
    return s.why_not == nullptr ? std::nullopt : std::optional<std::string>(s.why_not);
}

std::vector<int64_t> conv_tiles(std::string_view kind, const Tensor& x) {
    std::vector<int64_t> flat;
    if (const std::optional<ConvType> type = type_of(x.scalar_type())) {
        ConvTile found[kConvTiles];
        const int count = kind_of(kind).tiles(*type, found);
        for (int i = 0; i < count; i++) flat.insert(flat.end(), {found[i].m, found[i].n});
    }
    return flat;
}

Tensor conv_bias_act(const Tensor& x, const Tensor& weight, const OptTensor& bias, IntList stride, IntList padding,
                     IntList dilation, int64_t groups, int64_t act, double act_param, const OptTensor& residual,
                     IntList tile) {
    const OnDevice guard(x);
    const auto [g, why_not] =
        sized(kFprop, x.scalar_type(), x.sizes(), weight.sizes(), stride, padding, dilation, groups);
    if (why_not != nullptr) return Tensor();
    const ConvTile chosen = tile_of(tile, g, kFprop);
    const Tensor from = operand("x", x, x), w = operand("weight", weight, x);
    const Tensor y = empty_nhwc({g.n, g.k, g.p(), g.q()}, x.options());
    const Tensor r = residual ? aligned(like("residual", *residual, y)) : Tensor();
    Tensor b;
    if (bias) {
        const Options like = x.options().dtype(bias->scalar_type());
        FR_CHECK(bias->dim() == 1 && bias->size(0) == g.k && bias->options() == like, "bias: expected ", g.k,
                 " values in ", like, ", got ", bias->sizes(), " in ", bias->options());
        b = aligned(bias->to(ScalarType::Float).contiguous());
    }
    const ConvInference t{from.data_ptr(),
                          w.data_ptr(),
                          b.defined() ? static_cast<const float*>(b.data_ptr()) : nullptr,
                          r.defined() ? r.data_ptr() : nullptr,
                          act_of(act),
                          static_cast<float>(act_param),
                          y.data_ptr()};
    check(conv_fprop_sm90(g, chosen, t, current_stream(x)), "conv_bias_act");
    return y;
}

Tensor conv_backward_input(const Tensor& dy, const Tensor& weight, IntList size, IntList stride, IntList padding,
                           IntList dilation, int64_t groups, const OptTensor& add, IntList tile) {
    const OnDevice guard(dy);
    FR_CHECK(dy.dim() == 4 && weight.dim() == 4 && dy.size(1) == weight.size(0),
             "dy: expected [N, K, P, Q] of a weight [K, C, R, S], got ", dy.sizes(), " and ", weight.sizes());
    const int64_t x[4] = {dy.size(0), weight.size(1) * groups, size[0], size[1]};
    const auto [g, why_not] = sized(kDgrad, dy.scalar_type(), x, weight.sizes(), stride, padding, dilation, groups);
    if (why_not != nullptr) return Tensor();
    FR_CHECK(dy.size(2) == g.p() && dy.size(3) == g.q(), "dy: expected images of ", g.p(), " x ", g.q(), ", got ",
             dy.sizes());
    const ConvTile chosen = tile_of(tile, g, kDgrad);
    const Tensor from = operand("dy", dy, dy), w = operand("weight", weight, dy);
    const Tensor dx = empty_nhwc(x, dy.options());
    const Tensor a = add ? aligned(like("add", *add, dx, "x")) : Tensor();
    const ConvDgrad t{from.data_ptr(), w.data_ptr(), a.defined() ? a.data_ptr() : nullptr, dx.data_ptr()};
    check(conv_dgrad_sm90(g, chosen, t, current_stream(dy)), "conv_backward_input");
    return dx;
}

Tensor conv_backward_weight(const Tensor& dy, const Tensor& x, IntList kernel, IntList stride, IntList padding,
                            IntList dilation, int64_t groups, IntList tile) {
    const OnDevice guard(x);
    FR_CHECK(dy.dim() == 4 && x.dim() == 4, "dy: expected [N, K, P, Q] beside x [N, C, H, W], got ", dy.sizes(),
             " and ", x.sizes());
    const int64_t weight[4] = {dy.size(1), x.size(1) / std::max<int64_t>(groups, 1), kernel[0], kernel[1]};
    const auto [g, why_not] = sized(kWgrad, x.scalar_type(), x.sizes(), weight, stride, padding, dilation, groups);
    if (why_not != nullptr) return Tensor();
    FR_CHECK(dy.size(0) == g.n && dy.size(2) == g.p() && dy.size(3) == g.q(), "dy: expected ", g.n, " images of ",
             g.p(), " x ", g.q(), ", got ", dy.sizes());
    const ConvTile chosen = tile_of(tile, g, kWgrad);
    const Tensor from = operand("dy", dy, x), a = operand("x", x, x);
    const Tensor dw = empty_nhwc(weight, x.options().dtype(ScalarType::Float));
    const ConvWgrad t{from.data_ptr(), a.data_ptr(), static_cast<float*>(dw.data_ptr())};
    check(conv_wgrad_sm90(g, chosen, t, current_stream(x)), "conv_backward_weight");
    return dw;
}

}  // namespace fused_resnet::cuda::ops
