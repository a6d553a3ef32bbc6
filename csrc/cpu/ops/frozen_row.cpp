// A frozen row in one call: the steps that fused_resnet/frozen/forward.py recorded, one after the other.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include "reader.h"

namespace fused_resnet::cpu {

namespace {

// In the order of KINDS in fused_resnet/backends/cpu_steps.py.
enum class Kind { aten, onednn, winograd, pointwise, stem, bn_act, bn_act_max_pool, max_pool, avg_pool, pad };

// What a profiler calls them.
constexpr const char* kNames[] = {"fused_resnet_cpu::aten_bias_act",
                                  "fused_resnet_cpu::onednn_bias_act",
                                  "fused_resnet_cpu::winograd_bias_act",
                                  "fused_resnet_cpu::pointwise_bias_act",
                                  "fused_resnet_cpu::stem_bias_act_max_pool",
                                  "fused_resnet_cpu::bn_act",
                                  "fused_resnet_cpu::bn_act_max_pool",
                                  "fused_resnet_cpu::max_pool",
                                  "fused_resnet_cpu::avg_pool",
                                  "fused_resnet_cpu::pad"};

using Scalars = c10::List<std::optional<at::Scalar>>;

constexpr at::MemoryFormat kRows = at::MemoryFormat::ChannelsLast;

struct Step {
    Kind kind;
    int64_t x, residual, first, count;  // results by their number (-1: none); where its tensors are among the row's
    bool owned;                         // the residual's memory may be overwritten
    std::array<int64_t, 2> stride, padding, dilation;
    int64_t groups, act, channels, post_op;  // channels after padding; which of the row's names
    std::optional<Window> pool;
    double act_param;
    Scalars scalars;  // of the post-op

    explicit Step(Reader& from) : kind(Kind(from.next())) {
        TORCH_CHECK(Kind::aten <= kind && kind <= Kind::pad, "frozen_row: no step of kind ", int64_t(kind));
        x = from.next(), residual = from.next(), first = from.next(), count = from.next();
        owned = from.next();
        stride = from.pair(), padding = from.pair(), dilation = from.pair();
        groups = from.next(), act = from.next(), channels = from.next(), post_op = from.next();
        pool = Window::read(from);
        act_param = from.real();
        for (int64_t n = from.next(); n > 0; n--) scalars.push_back(at::Scalar(from.real()));
    }
};

// A step's tensors. `rest`: what follows the weight and the bias.
struct Operands {
    Tensor x;
    OptTensor residual;
    at::TensorList all;
    const Tensor& weight() const { return all[0]; }
    const Tensor& bias() const { return all[1]; }
    at::TensorList rest() const { return all.slice(2); }
};

Tensor by_aten(const Step& s, const Operands& o) {
    const Tensor y = at::conv2d(o.x, o.weight(), o.bias(), s.stride, s.padding, s.dilation, s.groups).contiguous(kRows);
    if (!o.rest().empty()) bn_act_in_place(y, o.rest(), s.act, s.act_param, o.residual);
    return y;
}

// An operator of oneDNN's convolutions, boxed: its C++ signature is none of PyTorch's promises.
template <class... Arguments>
Tensor convolved(const char* name, const char* overload, const Arguments&... arguments) {
    c10::Stack stack = {c10::IValue(arguments)...};
    c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).callBoxed(stack);
    return stack[0].toTensor();
}

Tensor by_onednn(const Step& s, const Operands& o, const std::string& post_op) {
    const char* const name = "mkldnn::_convolution_pointwise";
    const IntList padding = s.padding, stride = s.stride, dilation = s.dilation;
    if (!o.residual)
        return convolved(name, "", o.x, o.weight(), o.bias(), padding, stride, dilation, s.groups, post_op, s.scalars,
                         "");
    const c10::IValue relu = post_op == "none" ? c10::IValue() : c10::IValue(post_op);
    const Tensor& r = *o.residual;
    if (s.owned)
        return convolved("mkldnn::_convolution_pointwise_", "binary", r, o.x, o.weight(), o.bias(), padding, stride,
                         dilation, s.groups, "add", 1.0, relu, Scalars(), "");
    return convolved(name, "binary", o.x, r, o.weight(), o.bias(), padding, stride, dilation, s.groups, "add", 1.0,
                     relu, Scalars(), "");
}

Tensor by_product(const Step& s, const Operands& o) {
    const Tensor out = s.owned && o.residual ? *o.residual
                                             : at::empty({o.x.size(0), o.bias().numel(), o.x.size(2), o.x.size(3)},
                                                         o.x.options().memory_format(kRows));
    pointwise_bias_act(o.x, o.weight(), o.bias(), s.act, s.act_param, o.residual, out);
    return out;
}

Tensor run(const Step& s, const Operands& o, const c10::List<std::string>& post_ops) {
    switch (s.kind) {
        case Kind::aten: return by_aten(s, o);
        case Kind::onednn: return by_onednn(s, o, post_ops.get(s.post_op));
        case Kind::winograd:
            return winograd_bias_act(o.x, o.weight(), o.bias(), s.padding[0], s.act, s.act_param, o.residual);
        case Kind::pointwise: return by_product(s, o);
        case Kind::stem:
            return stem_bias_act_max_pool(o.x, o.weight(), o.bias(), s.stride, s.padding, s.act, s.act_param,
                                          s.pool->kernel, s.pool->stride, s.pool->padding);
        case Kind::bn_act: return bn_act(o.x, o.all, s.act, s.act_param, o.residual, {}, o.x.scalar_type());
        case Kind::bn_act_max_pool:
            return std::get<0>(
                bn_act_max_pool(o.x, o.all, s.act, s.act_param, s.pool->kernel, s.pool->stride, s.pool->padding));
        case Kind::max_pool: return at::max_pool2d(o.x, s.pool->kernel, s.pool->stride, s.pool->padding);
        case Kind::avg_pool: return s.pool->average(o.x);
        case Kind::pad: return padded(every(o.x, s.stride), s.channels);
    }
    return {};
}

}  // namespace

Tensor frozen_row(const Tensor& x, const OptTensor& residual, at::TensorList tensors, const Tensor& ints,
                  const Tensor& reals, const c10::List<std::string>& post_ops) {
    Reader from{IntList(ints.const_data_ptr<int64_t>(), ints.numel()),
                at::ArrayRef<double>(reals.const_data_ptr<double>(), reals.numel())};
    std::vector<Step> steps;
    for (int64_t n = from.next(); n > 0; n--) steps.emplace_back(from);
    // results 0 and 1 are the row's input and summand; each goes when its last step has run
    std::vector<Tensor> results = {x, residual.value_or(Tensor())};
    std::vector<size_t> last(steps.size() + 2, 0);
    for (size_t i = 0; i < steps.size(); i++)
        for (const int64_t used : {steps[i].x, steps[i].residual})
            if (used >= 0) last.at(used) = i;
    for (size_t i = 0; i < steps.size(); i++) {
        const Step& s = steps[i];
        RECORD_FUNCTION(kNames[size_t(s.kind)], std::vector<c10::IValue>({results[s.x]}));
        OptTensor summand;
        if (s.residual >= 0) summand = results[s.residual];
        results.push_back(run(s, {results[s.x], summand, tensors.slice(s.first, s.count)}, post_ops).contiguous(kRows));
        for (const int64_t used : {s.x, s.residual})
            if (used >= 0 && last[used] == i) results[used].reset();
    }
    return results.back();
}

}  // namespace fused_resnet::cpu
