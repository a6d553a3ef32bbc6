// A row of chains in one call: its forward, its backward, and inference. The steps and their formulas are those of
// fused_resnet/chain/forward.py and backward.py, which compose any backend's primitives.
#include <memory>

#include "row_spec.h"

namespace fused_resnet::cpu {

namespace {

// What all convolutions of a call share.
struct Setting {
    MemoryFormat format;
    ScalarType compute;
    bool gemm;

    // The layout: channels_last if x or a weight is, as in PyTorch's convolutions.
    Setting(const Tensor& x, TensorList params, ScalarType compute, bool gemm) : compute(compute), gemm(gemm) {
        const auto last = [](const Tensor& t) { return t.suggests_channels_last(); };
        const bool rows = last(x) || std::any_of(params.begin(), params.end(), last);
        format = rows ? kRows : kPlanes;
    }
    // A unit after its convolution of act(norm(x)), or of x without a norm: y, and its mean and variance if they count.
    std::tuple<Tensor, Tensor, Tensor> raw(const Unit& u, const Tensor& x, const Norm* norm, const Unit* before,
                                           bool stats) const {
        if (!u.conv) {
            if (!stats) return {x, Tensor(), Tensor()};
            const Profiled step("fused_resnet_cpu::bn_stats", {&x});
            auto [mean, var] = bn_stats(x);
            return {x, mean, var};
        }
        const Profiled step("fused_resnet_cpu::conv_stats", {&x, &u.tensors[kWeight]});
        auto [y, mean, var] = conv_stats(x, u.tensors[kWeight], u.stride, u.padding, u.dilation, u.groups,
                                         norm ? norm->pair() : TensorList(), norm ? before->act : 0,
                                         norm ? before->act_param : 0, stats, compute, gemm, u.products);
        return {y.contiguous(format), mean, var};
    }
};

// ---------------------------------------------------------------------------------------------------- forward
// Appends the chain's raw outputs, statistics and positions to `saved`. Returns its output.
Tensor forward(const Chain& chain, const Tensor& x, const OptTensor& residual, const Setting& set,
               std::vector<Tensor>& saved) {
    const ScalarType dtype = wide(x);
    std::vector<Tensor> vectors;
    std::vector<Norm> norms;
    const auto unit = [&](size_t i, const Tensor& start) {
        const Unit& u = chain.units[i];
        const bool inner = i > 0 && i < chain.length();
        auto [y, mean, var] =
            set.raw(u, start, inner ? &norms.back() : nullptr, inner ? &chain.units[i - 1] : nullptr, u.batch_stats);
        if (u.conv && !(chain.recompute && i == 0)) saved.push_back(y);
        norms.push_back(u.fold(u.batch_stats ? mean : u.tensors[kMean], u.batch_stats ? var : u.tensors[kVar], dtype));
        vectors.insert(vectors.end(), norms.back().begin(), norms.back().end());
        if (u.batch_stats) vectors.push_back(var);
        return y;
    };
    Tensor y = x;
    for (size_t i = 0; i < chain.length(); i++) y = unit(i, y);
    const Norm norm = norms.back();
    const Unit& last = chain.last();
    Tensor out, argmax, summand = chain.start(x, residual, set.format);
    if (chain.projection()) summand = unit(chain.length(), summand);
    if (chain.pool) {
        const Profiled step("fused_resnet_cpu::bn_act_max_pool", {&y});
        std::tie(out, argmax) = bn_act_max_pool(y, norm.pair(), last.act, last.act_param, chain.pool->kernel,
                                                chain.pool->stride, chain.pool->padding);
    } else {
        const Profiled step("fused_resnet_cpu::bn_act", {&y});
        out = bn_act(y, norm.pair(), last.act, last.act_param, summand.defined() ? OptTensor(summand) : std::nullopt,
                     chain.projection() ? norms.back().pair() : TensorList(), y.scalar_type());
    }
    saved.insert(saved.end(), vectors.begin(), vectors.end());
    if (argmax.defined()) saved.push_back(argmax);
    return out;
}

// ---------------------------------------------------------------------------------------------------- inference
// The chain's output by running statistics, which nothing is saved for.
Tensor inference(const Chain& chain, const Tensor& x, const OptTensor& residual, const Setting& set) {
    const auto unit = [&](const Unit& u, const Tensor& h, int64_t act, double act_param, const Tensor& summand) {
        const Norm norm = u.fold(u.tensors[kMean], u.tensors[kVar], wide(h));
        const OptTensor r = summand.defined() ? OptTensor(summand) : std::nullopt;
        if (!u.conv) return bn_act(h, norm.pair(), act, act_param, r, {}, h.scalar_type());
        const Profiled step("fused_resnet_cpu::conv_bn_act", {&h, &u.tensors[kWeight]});
        return conv_bn_act(h, u.tensors[kWeight], u.stride, u.padding, u.dilation, u.groups, norm.pair(), act,
                           act_param, r, set.compute, set.gemm, u.products)
            .contiguous(set.format);
    };
    Tensor summand = chain.start(x, residual, set.format);
    if (chain.projection()) summand = unit(chain.units.back(), summand, 0, 0, Tensor());
    Tensor h = x;
    for (size_t i = 0; i + 1 < chain.length(); i++)
        h = unit(chain.units[i], h, chain.units[i].act, chain.units[i].act_param, Tensor());
    const Unit& last = chain.last();
    if (!chain.pool) return unit(last, h, last.act, last.act_param, summand);
    // the pool normalises on load
    const Tensor y = std::get<0>(set.raw(last, h, nullptr, nullptr, false));
    const Norm norm = last.fold(last.tensors[kMean], last.tensors[kVar], wide(h));
    return std::get<0>(bn_act_max_pool(y, norm.pair(), last.act, last.act_param, chain.pool->kernel, chain.pool->stride,
                                       chain.pool->padding));
}

// ---------------------------------------------------------------------------------------------------- backward
// The step that takes a gradient through a chain's add and activation.
struct Closing {
    Tensor y;
    Norm norm;
    int64_t act;
    double act_param;
    Tensor summand;
    std::optional<Norm> summand_norm;
};

// dz after a closing; its sums with y, and with the summand if that has a norm.
struct Closed {
    Tensor dz, sum, sum_y, sum_summand;
};

Closed close(const Tensor& dout, const Closing& c) {
    const Profiled step("fused_resnet_cpu::bn_act_backward", {&dout, &c.y});
    auto [dz, s0, s1, s2] = bn_act_backward(dout, c.y, c.norm.triple(), c.act, c.act_param,
                                            c.summand.defined() ? OptTensor(c.summand) : std::nullopt,
                                            c.summand_norm ? c.summand_norm->triple() : TensorList());
    return {dz, s0, s1, s2};
}

// A chain's values from its forward; ys and norms are those of its units.
struct Recalled {
    const Chain& chain;
    Tensor x;
    std::vector<Tensor> ys;
    std::vector<Norm> norms;
    Tensor summand, argmax;

    Recalled(const Chain& chain, const Tensor& x, const OptTensor& residual, const Tensor* saved, const Setting& set)
        : chain(chain), x(x) {
        for (size_t i = 0; i < chain.units.size(); i++) {
            const Unit& u = chain.units[i];
            const bool again = u.conv && chain.recompute && i == 0;
            ys.push_back(!u.conv ? x : again ? std::get<0>(set.raw(u, x, nullptr, nullptr, false)) : *saved++);
        }
        for (const Unit& u : chain.units) {
            norms.push_back({{saved[0], saved[1], saved[2], saved[3]}});
            saved += 4 + u.batch_stats;
        }
        summand = chain.projection() ? ys.back() : chain.start(x, residual, set.format);
        if (chain.pool) argmax = *saved;
    }
    Closing closing() const {
        const size_t k = chain.length() - 1;
        const Unit& last = chain.last();
        return {ys[k],          norms[k], last.act,
                last.act_param, summand,  chain.projection() ? std::optional<Norm>(norms.back()) : std::nullopt};
    }
};

// How many values a chain saves beside its output.
size_t count_saved(const Chain& chain) {
    size_t n = chain.pool.has_value() - chain.recompute;
    for (const Unit& u : chain.units) n += u.conv + 4 + u.batch_stats;
    return n;
}

// The gradients of one chain: of its input, and of its parameters at their places in `grads`.
struct Gradients {
    const Recalled& of;
    const Closed& closed;
    const Setting& set;
    bool need_input;
    List<bool> needs;  // of the row's parameters
    std::vector<Tensor>& grads;

    bool wanted(const Unit& u) const {
        return std::any_of(u.place.begin(), u.place.end(), [&](int64_t p) { return p >= 0 && needs[p]; });
    }
    void put(const Unit& u, Param p, const Tensor& grad) const {
        if (u.place[p] >= 0) grads[u.place[p]] = grad;
    }
    // Unit i's gradients from dz and its sums; returns its input's, through the closing before that, if there is one.
    Closed unit(size_t i, const Tensor& dz, const Tensor& sum, const Tensor& sum_y, const Tensor& start,
                bool need_start, const Tensor& add, const Closing* before) const {
        const Unit& u = of.chain.units[i];
        const Norm& norm = of.norms[i];
        const Tensor& y = of.ys[i];
        const bool inner = i > 0 && i < of.chain.length(),
                   need_weight = u.place[kWeight] >= 0 && needs[u.place[kWeight]];
        const auto count = u.batch_stats ? std::optional<int64_t>(y.numel() / y.size(1)) : std::nullopt;
        auto [dgamma, b, c] = bn_coefficients(norm[0], norm[3], sum, sum_y, count);
        put(u, kGamma, dgamma);
        put(u, kBeta, sum);
        // y minus its mean does not depend on the convolution's bias
        if (u.place[kBias] >= 0)
            put(u, kBias,
                u.batch_stats ? zeros(sum.sizes(), sum.options()) : call({"aten::mul", "Tensor"}, norm[0], sum)[0]);
        if (!need_start && !need_weight) return {};
        const std::array<Tensor, 4> all = {norm[0], b, c, norm[2]};
        const TensorList coef(all.data(), u.batch_stats ? 4 : 1);
        if (!u.conv) {
            const Profiled step("fused_resnet_cpu::bn_backward", {&dz, &y});
            return {bn_backward(dz, y, coef, y.scalar_type()), {}, {}, {}};
        }
        const Unit& previous = of.chain.units[inner ? i - 1 : i];
        const auto convolve = [&] {
            const Profiled step("fused_resnet_cpu::conv_backward", {&dz, &start, &u.tensors[kWeight]});
            return conv_backward(dz, y, coef, start, inner ? of.norms[i - 1].triple() : TensorList(),
                                 inner ? previous.act : 0, inner ? previous.act_param : 0, u.tensors[kWeight], u.stride,
                                 u.padding, u.dilation, u.groups, need_start, need_weight,
                                 add.defined() ? OptTensor(add) : std::nullopt, set.compute, set.gemm, u.products);
        };
        auto [dx, dw, s0, s1] = convolve();
        if (dw.defined()) put(u, kWeight, dw);
        if (need_start && before) return close(dx, *before);
        return {dx, s0, s1, {}};
    }
    // The projection's unit, whose input is the shortcut's.
    Closed projection(const Tensor& add, const Closing* before) const {
        const Chain& chain = of.chain;
        const Tensor start = chain.start(of.x, std::nullopt, set.format);
        // dbeta is the last unit's too, copied because an operator's outputs must not share memory
        return unit(chain.length(), closed.dz, closed.sum.clone(), closed.sum_summand, start, need_input, add, before);
    }
    // The gradient of x through the shortcut; undefined for a projection of x itself, which runs after the units.
    Tensor shortcut() const {
        const Chain& chain = of.chain;
        if (chain.shortcut == kIdentity && need_input) return closed.dz;
        if (chain.shortcut == kPad && need_input) {
            const Tensor dx = zeros(of.x.sizes(), closed.dz.options(), set.format);
            copy(chain.pixels(dx), closed.dz.narrow(1, of.x.size(1)));
            return dx;
        }
        if (!chain.average) return Tensor();
        const Tensor dstart = projection(Tensor(), nullptr).dz;
        if (!dstart.defined()) return Tensor();
        return chain.average->average_backward(dstart.to(of.x.scalar_type()), of.x);
    }
    // The units, last to first; their gradient of x is added to dx, the sum goes through the closing before.
    Closed all_units(const Tensor& dx, const Closing* before) const {
        const std::vector<Unit>& units = of.chain.units;
        Closed now{closed.dz, closed.sum, closed.sum_y, {}};
        for (size_t i = of.chain.length() - 1; i > 0; i--) {
            const bool need_start =
                need_input || std::any_of(units.begin(), units.begin() + i, [&](const Unit& u) { return wanted(u); });
            now = unit(i, now.dz, now.sum, now.sum_y, of.ys[i - 1], need_start, Tensor(), nullptr);
            if (!need_start) return {dx, {}, {}, {}};
        }
        const bool conv = units[0].conv;
        const Closed first =
            unit(0, now.dz, now.sum, now.sum_y, of.x, need_input, conv ? dx : Tensor(), conv ? before : nullptr);
        if (!first.dz.defined()) return {dx, {}, {}, {}};
        if (conv || !dx.defined()) return first;
        const Tensor sum = dx.clone();
        add_to(sum, first.dz);
        return {sum, {}, {}, {}};
    }
    // dx, or dz of the closing before x with its sums.
    Closed run(const Closing* before) const {
        const bool direct = of.chain.projection() && !of.chain.average;
        const Closed found = all_units(shortcut(), direct ? nullptr : before);
        return direct ? projection(found.dz, before) : found;
    }
};

Tensor empty_like(const Tensor& t) {
    const auto no = std::nullopt;
    return call("aten::empty_like", t, no, no, no, no, no)[0];
}

// The gradient in its tensor's dtype and strides, otherwise autograd would copy it later; 0 if there is none.
Tensor like(const Tensor& grad, const Tensor& t) {
    const bool dense = t.is_contiguous() || t.is_channels_last();
    const Tensor as = dense ? t : empty_like(t);  // its strides are wanted
    if (!grad.defined()) {
        const Tensor none = empty_strided(t.sizes(), as.strides(), t.options());
        check(aoti_torch_zero_(none.get()), "zeros");
        return none;
    }
    const Tensor g = grad.to(t.scalar_type());
    if (g.strides() == as.strides()) return g;
    bool same = true;
    for (int64_t d = 0; d < t.dim(); d++) same = same && (t.size(d) == 1 || g.stride(d) == as.stride(d));
    if (same) return g.view(t.sizes(), as.strides());
    const Tensor to = empty_strided(t.sizes(), as.strides(), t.options());
    copy(to, g);
    return to;
}

}  // namespace

std::vector<Tensor> row_forward(const Tensor& x, const OptTensor& residual, TensorList params, const Tensor& ints,
                                const Tensor& reals, ScalarType compute, bool gemm) {
    const std::vector<Chain> chains = read_chains(ints, reals, params);
    const Setting set(x, params, compute, gemm);
    std::vector<Tensor> outs, saved;
    Tensor h = x;
    for (const Chain& chain : chains) {
        h = forward(chain, h.contiguous(set.format), residual, set, saved);
        outs.push_back(h);
    }
    std::vector<Tensor> all = {outs.back()};
    all.insert(all.end(), outs.begin(), outs.end() - 1);
    all.insert(all.end(), saved.begin(), saved.end());
    return all;
}

std::vector<Tensor> row_backward(const Tensor& dout, const Tensor& x, const OptTensor& residual, TensorList weights,
                                 TensorList saved, const Tensor& ints, const Tensor& reals, const Tensor& needs,
                                 ScalarType compute, bool gemm) {
    auto [chains, count] = read_chains(ints, reals);
    const Setting set(x, weights, compute, gemm);
    const List<bool> flags = values<bool>("needs", needs, ScalarType::Bool);
    FR_CHECK(int64_t(flags.size()) == 2 + count, "needs: expected ", 2 + count, " flags, got ", flags.size());
    const bool need_x = flags[0], need_residual = flags[1];
    const List<bool> wanted = flags.slice(2);  // of the parameters
    std::vector<Tensor> grads(count), weight_of(count);
    size_t convs = 0;
    for (Chain& chain : chains)
        for (Unit& u : chain.units)
            if (u.conv) {
                FR_CHECK(convs < weights.size(), "weights: expected more than ", weights.size());
                u.tensors[kWeight] = weight_of[u.place[kWeight]] = weights[convs++];
            }
    const size_t last = chains.size() - 1;
    std::vector<size_t> first = {last};  // of each chain's values among `saved`
    for (const Chain& chain : chains) first.push_back(first.back() + count_saved(chain));
    FR_CHECK(first.back() == saved.size(), "saved: expected ", first.back(), " tensors, got ", saved.size());
    const auto recall = [&](size_t i) {
        const Tensor start = i ? saved[i - 1] : x.contiguous(set.format);
        return std::make_unique<Recalled>(chains[i], start, residual, saved.data() + first[i], set);
    };

    auto now = recall(last);
    const Tensor top = dout.contiguous(set.format);
    Closed closed;
    const Closing closing = now->closing();
    if (const auto& pool = chains[last].pool) {
        const Profiled step("fused_resnet_cpu::bn_act_max_pool_backward", {&top, &closing.y});
        auto [dz, s0, s1] =
            bn_act_max_pool_backward(top, now->argmax, closing.y, closing.norm.triple(), closing.act, closing.act_param,
                                     pool->kernel, pool->stride, pool->padding, compute);
        closed = {dz, s0, s1, {}};
    } else {
        closed = close(top, closing);
    }
    Tensor dx, dresidual;
    for (size_t i = last;; i--) {
        // the parameters of the chains before come first
        const auto own = wanted.begin() + chains[i].first;
        const bool need_input = need_x || std::find(wanted.begin(), own, true) != own;
        if (chains[i].shortcut == kTensor && need_residual) dresidual = closed.dz;
        auto before = i && need_input ? recall(i - 1) : nullptr;
        const auto closing = before ? std::optional<Closing>(before->closing()) : std::nullopt;
        const Closed found = Gradients{*now, closed, set, need_input, wanted, grads}.run(closing ? &*closing : nullptr);
        if (!before) {
            dx = found.dz;
            break;
        }
        closed = found;
        now = std::move(before);
    }
    std::vector<Tensor> out;
    if (need_x) out.push_back(like(dx, x));
    if (need_residual && residual) out.push_back(like(dresidual, *residual));
    for (int64_t p = 0; p < count; p++) {
        if (!wanted[p]) continue;
        FR_CHECK(weight_of[p].defined() || grads[p].defined(), "needs: parameter ", p, " has no gradient");
        // autograd sees to the dtypes of vectors
        out.push_back(weight_of[p].defined() ? like(grads[p], weight_of[p]) : grads[p]);
    }
    return out;
}

Tensor row_inference(const Tensor& x, const OptTensor& residual, TensorList params, const Tensor& ints,
                     const Tensor& reals, ScalarType compute, bool gemm) {
    const Setting set(x, params, compute, gemm);
    Tensor h = x.contiguous(set.format);
    for (const Chain& chain : read_chains(ints, reals, params)) h = inference(chain, h, residual, set);
    return h;
}

}  // namespace fused_resnet::cpu
