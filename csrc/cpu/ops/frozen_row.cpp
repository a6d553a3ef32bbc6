// A frozen row in one call: the steps that fused_resnet/frozen/forward.py recorded, one after the other.
#include "arena.h"
#include "bands.h"
#include "onednn.h"
#include "reader.h"

namespace fused_resnet::cpu {

namespace {

// In the order of KINDS in fused_resnet/backends/cpu_steps.py.
enum class Kind {
    aten,
    onednn,
    winograd,
    gemm,
    depthwise,
    grouped,
    stem,
    bn_act,
    bn_act_max_pool,
    max_pool,
    avg_pool,
    pad,
    excitation,
    average
};

// What a profiler calls them.
constexpr const char* kNames[] = {"fused_resnet_cpu::aten_bias_act",
                                  "fused_resnet_cpu::onednn_bias_act",
                                  "fused_resnet_cpu::winograd_bias_act",
                                  "fused_resnet_cpu::gemm_bias_act",
                                  "fused_resnet_cpu::depthwise_bias_act",
                                  "fused_resnet_cpu::grouped_bias_act",
                                  "fused_resnet_cpu::stem_bias_act_max_pool",
                                  "fused_resnet_cpu::bn_act",
                                  "fused_resnet_cpu::bn_act_max_pool",
                                  "fused_resnet_cpu::max_pool",
                                  "fused_resnet_cpu::avg_pool",
                                  "fused_resnet_cpu::pad",
                                  "fused_resnet_cpu::excite",
                                  "fused_resnet_cpu::channel_means"};

constexpr int64_t kUndilated[] = {1, 1};
constexpr Window kOneValue{{1, 1}, {1, 1}, {0, 0}, false, false};

// oneDNN's names of activations, in the order of POST_OPS in fused_resnet/backends/cpu_steps.py.
constexpr const char* kPostOps[] = {"none", "relu", "leaky_relu", "sigmoid", "swish", "hardtanh", "hardswish"};

struct Step {
    Kind kind;
    int64_t x, residual, first, count;  // results by their number (-1: none); where its tensors are among the row's
    bool owned;                         // the residual's memory may be overwritten
    std::array<int64_t, 2> stride, padding, dilation;
    int64_t groups, act, channels, post_op, gate;  // channels after padding; which of kPostOps; an activation
    std::optional<Window> pool;
    double act_param;
    std::vector<double> scalars;  // of the post-op, or the gate's parameter

    explicit Step(Reader& from) : kind(Kind(from.next())) {
        FR_CHECK(Kind::aten <= kind && kind <= Kind::average, "frozen_row: no step of kind ", int64_t(kind));
        x = from.next(), residual = from.next(), first = from.next(), count = from.next();
        owned = from.next();
        stride = from.pair(), padding = from.pair(), dilation = from.pair();
        groups = from.next(), act = from.next(), channels = from.next(), post_op = from.next();
        gate = from.next();
        FR_CHECK(post_op >= 0 && post_op < int64_t(std::size(kPostOps)), "frozen_row: no post-op ", post_op);
        pool = Window::read(from);
        act_param = from.real();
        for (int64_t n = from.next(); n > 0; n--) scalars.push_back(from.real());
    }
};

// A step's tensors. `rest`: what follows the weight and the bias.
struct Operands {
    Tensor x;
    OptTensor residual;
    TensorList all;
    const Tensor& weight() const { return all[0]; }
    const Tensor& bias() const { return all[1]; }
    TensorList rest() const { return all.slice(2); }
};

Tensor by_aten(const Step& s, const Operands& o) {
    const Tensor y = conv2d(o.x, o.weight(), o.bias(), s.stride, s.padding, s.dilation, s.groups).contiguous(kRows);
    if (!o.rest().empty()) bn_act_in_place(y, o.rest(), s.act, s.act_param, o.residual);
    return y;
}

Tensor by_onednn(const Step& s, Operands o) {
    const ScalarType dtype = o.x.scalar_type(), compute = o.weight().scalar_type();
    const bool converted = dtype != compute;
    if (converted) {
        o.x = o.x.to(compute);
        if (o.residual) o.residual = o.residual->to(compute);
    }
    const char* const post_op = kPostOps[s.post_op];
    AtenTensorHandle x = o.x.get(), weight = o.weight().get(), bias = o.bias().get(), y = nullptr;
    const int64_t *const padding = s.padding.data(), *const stride = s.stride.data(),
                         *const dilation = s.dilation.data();
    const char* algorithm = "";
    if (!o.residual) {
        std::vector<const double*> scalars;
        for (const double& scalar : s.scalars) scalars.push_back(&scalar);
        check(
            aoti_torch_cpu_mkldnn__convolution_pointwise(x, weight, &bias, padding, 2, stride, 2, dilation, 2, s.groups,
                                                         post_op, scalars.data(), scalars.size(), &algorithm, &y),
            "oneDNN's convolution");
        return Tensor(y).to(dtype);
    }
    double alpha = 1;
    const char** const relu = s.post_op == 0 ? nullptr : const_cast<const char**>(&post_op);
    AtenTensorHandle r = o.residual->get();
    const auto summed = [&](auto function, AtenTensorHandle first, AtenTensorHandle second) {
        check(function(first, second, weight, &bias, padding, 2, stride, 2, dilation, 2, s.groups, "add", &alpha, relu,
                       nullptr, 0, &algorithm, &y),
              "oneDNN's convolution");
        return Tensor(y).to(dtype);
    };
    return s.owned || converted ? summed(aoti_torch_cpu_mkldnn__convolution_pointwise_binary_, r, x)
                                : summed(aoti_torch_cpu_mkldnn__convolution_pointwise_binary, x, r);
}

Tensor by_product(const Step& s, const Operands& o) {
    const Tensor& packed = o.weight();
    const auto size = [&](int i) {
        return output_size(o.x.size(2 + i), packed.size(1 + i), s.stride[i], s.padding[i], s.dilation[i]);
    };
    const Tensor out =
        s.owned && o.residual ? *o.residual : result({o.x.size(0), o.bias().numel(), size(0), size(1)}, o.x.options());
    gemm_bias_act(o.x, packed, o.bias(), s.stride, s.padding, s.dilation, s.act, s.act_param, o.residual, out);
    return out;
}

Tensor run(const Step& s, const Operands& o) {
    switch (s.kind) {
        case Kind::aten: return by_aten(s, o);
        case Kind::onednn: return by_onednn(s, o);
        case Kind::winograd:
            return winograd_bias_act(o.x, o.weight(), o.bias(), s.padding[0], s.act, s.act_param, o.residual);
        case Kind::gemm: return by_product(s, o);
        case Kind::depthwise:
            return depthwise_bias_act(o.x, o.weight(), o.bias(), s.stride, s.padding, s.dilation, s.act, s.act_param,
                                      o.residual);
        case Kind::grouped:
            return grouped_bias_act(o.x, o.weight(), o.bias(), s.stride, s.padding, s.act, s.act_param, o.residual);
        case Kind::stem: {
            const Window pool = s.pool.value_or(kOneValue);
            return stem_bias_act_max_pool(o.x, o.weight(), o.bias(), s.stride, s.padding, s.act, s.act_param,
                                          pool.kernel, pool.stride, pool.padding);
        }
        case Kind::bn_act: return bn_act(o.x, o.all, s.act, s.act_param, o.residual, {}, o.x.scalar_type());
        case Kind::bn_act_max_pool:
            return std::get<0>(
                bn_act_max_pool(o.x, o.all, s.act, s.act_param, s.pool->kernel, s.pool->stride, s.pool->padding));
        case Kind::max_pool:
            return call("aten::max_pool2d", o.x, IntList(s.pool->kernel), IntList(s.pool->stride),
                        IntList(s.pool->padding), IntList(kUndilated), false)[0];
        case Kind::avg_pool: return s.pool->average(o.x);
        case Kind::pad: return padded(every(o.x, s.stride), s.channels, kRows);
        case Kind::excitation:
            excite(o.x, o.all[0], o.all[1], s.act, s.act_param, o.all[2], o.all[3], s.gate, s.scalars.at(0));
            return o.x;
        case Kind::average: return channel_means(o.x);
    }
    return {};
}

// A step's own packed weight, bias and activation.
Packed packed_of(const Step& s, TensorList tensors) {
    return {tensors[s.first], tensors[s.first + 1], s.act, s.act_param};
}

bool is_pointwise(const Step& s, TensorList tensors) {
    constexpr std::array<int64_t, 2> kOne{1, 1}, kNone{};
    if (s.kind != Kind::gemm || s.stride != kOne || s.padding != kNone) return false;
    return tensors[s.first].size(1) == 1 && tensors[s.first].size(2) == 1;
}

// How many steps from step i on pass through the image together (bands.h); 1: it runs alone. last: the last step that
// uses a result; outside: see returned_by.
size_t together(const std::vector<Step>& steps, size_t i, TensorList tensors, const std::vector<size_t>& last,
                const std::vector<bool>& outside, const Tensor& x) {
    // whether step j alone uses the result of the step before, as its image
    const auto follows = [&](size_t j, Kind kind) {
        if (j >= steps.size() || steps[j].kind != kind) return false;
        const int64_t before = int64_t(j) + 1;
        return steps[j].x == before && steps[j].residual != before && last[before] == j && !outside[j - 1];
    };
    if (!is_pointwise(steps[i], tensors) || steps[i].residual >= 0 || !follows(i + 1, Kind::depthwise)) return 1;
    if (steps[i + 1].residual >= 0 || !bands_suit(x, tensors[steps[i].first + 1].numel())) return 1;
    return follows(i + 2, Kind::gemm) && is_pointwise(steps[i + 2], tensors) ? 3 : 2;
}

// Which steps' results the row returns, or writes what it returns into.
std::vector<bool> returned_by(const std::vector<Step>& steps) {
    std::vector<bool> found(steps.size());
    found.back() = true;
    for (size_t i = steps.size(); i-- > 0;) {
        const Step& s = steps[i];
        const int64_t written = s.kind == Kind::excitation ? s.x : s.owned ? s.residual : -1;
        if (found[i] && written >= 2) found[written - 2] = true;
    }
    return found;
}

}  // namespace

Tensor frozen_row(const Tensor& x, const OptTensor& residual, TensorList tensors, const Tensor& ints,
                  const Tensor& reals) {
    Reader from(ints, reals);
    std::vector<Step> steps;
    for (int64_t n = from.next(); n > 0; n--) steps.emplace_back(from);
    FR_CHECK(!steps.empty(), "frozen_row: expected a step");
    // results 0 and 1 are the row's input and summand; each goes when its last step has run
    Arena arena;
    const std::vector<bool> outside = returned_by(steps);
    std::vector<Tensor> results = {x, residual.value_or(Tensor())};
    results.reserve(steps.size() + 2);
    std::vector<size_t> last(steps.size() + 2, 0);
    for (size_t i = 0; i < steps.size(); i++)
        for (const int64_t used : {steps[i].x, steps[i].residual})
            if (used >= 0) last.at(used) = i;
    for (size_t i = 0, count; i < steps.size(); i += count) {
        const Step& s = steps[i];
        const Tensor& image = results[s.x];
        count = together(steps, i, tensors, last, outside, image);
        const Step& end = steps[i + count - 1];
        const Profiled step(count > 1 ? "fused_resnet_cpu::in_bands" : kNames[size_t(s.kind)], {&image});
        OptTensor summand;
        if (end.residual >= 0) summand = results[end.residual];
        const Arena::Scope scope(outside[i + count - 1] ? nullptr : &arena);
        Tensor made;
        if (count > 1) {
            const Step& depthwise = steps[i + 1];
            const Packed narrow = packed_of(end, tensors);
            made = in_bands(image, packed_of(s, tensors), packed_of(depthwise, tensors), depthwise.stride,
                            depthwise.padding, depthwise.dilation, count > 2 ? &narrow : nullptr, summand, end.owned);
        } else {
            made = run(s, {image, summand, tensors.slice(s.first, s.count)}).contiguous(kRows);
        }
        results.resize(i + count + 1);  // nobody reads those in between
        results.push_back(made);
        const void* const place = made.data_ptr();  // maybe an operand's
        for (const int64_t used : {s.x, end.residual}) {
            if (used < 0 || last[used] < i || last[used] >= i + count || !results[used].defined()) continue;
            const void* const data = results[used].data_ptr();
            results[used] = Tensor();
            if (data != place) arena.drop(data);
        }
    }
    return results.back();
}

}  // namespace fused_resnet::cpu
