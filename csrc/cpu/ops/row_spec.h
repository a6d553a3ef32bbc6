// A row's spec and its tensors as row.cpp works with them, for that file alone.
#pragma once

#include "reader.h"

namespace fused_resnet::cpu {

namespace {

// [scale, shift, center, rstd]
struct Norm : std::array<Tensor, 4> {
    TensorList pair() const { return {data(), 2}; }
    TensorList triple() const { return {data(), 3}; }
};

// A unit's hyper-parameters and tensors; undefined: it has none. `place`: where each tensor is among the row's.
enum Param { kWeight, kBias, kGamma, kBeta, kMean, kVar, kParams };
struct Unit {
    bool conv, batch_stats;
    std::array<int64_t, 2> stride, padding, dilation;
    int64_t groups, products, act;  // products: ConvSpec's
    double act_param, eps;
    std::array<Tensor, kParams> tensors;
    std::array<int64_t, kParams> place;

    Unit(Reader& from, int64_t& next) {
        conv = from.next();
        stride = from.pair(), padding = from.pair(), dilation = from.pair();
        groups = from.next();
        products = from.next();
        const bool bias = from.next();
        act = from.next();
        batch_stats = from.next();
        const bool gamma = from.next(), beta = from.next();
        act_param = from.real(), eps = from.real();
        const bool has[kParams] = {conv, bias, gamma, beta, !batch_stats, !batch_stats};
        for (int p = 0; p < kParams; p++) place[p] = has[p] ? next++ : -1;
    }
    OptTensor given(Param p) const { return tensors[p].defined() ? OptTensor(tensors[p]) : std::nullopt; }
    Norm fold(const Tensor& mean, const Tensor& var, ScalarType dtype) const {
        auto [scale, shift, center, rstd] = bn_fold(mean.to(dtype), var.to(dtype), given(kGamma), given(kBeta),
                                                    batch_stats ? std::nullopt : given(kBias), eps);
        return {{std::move(scale), std::move(shift), std::move(center), std::move(rstd)}};
    }
};

enum Shortcut { kNone, kIdentity, kTensor, kProjection, kPad };
struct Chain {
    Shortcut shortcut;
    bool recompute;
    std::optional<Window> pool, average;
    std::array<int64_t, 2> stride;  // of the shortcut "pad"
    int64_t channels, first;        // of the sum of "pad"; its first parameter among the row's
    std::vector<Unit> units;        // the projection is the last

    Chain(Reader& from, int64_t& next) : first(next) {
        shortcut = Shortcut(from.next());
        recompute = from.next();
        pool = Window::read(from), average = Window::read(from);
        stride = from.pair();
        channels = from.next();
        const int64_t count = from.next();
        for (int64_t i = 0; i < count; i++) units.emplace_back(from, next);
    }
    bool projection() const { return shortcut == kProjection; }
    size_t length() const { return units.size() - projection(); }
    const Unit& last() const { return units[length() - 1]; }

    // The input of the shortcut: x, x averaged, x strided and padded, or a given tensor; undefined: there is none.
    Tensor start(const Tensor& x, const OptTensor& residual, MemoryFormat format) const {
        if (shortcut == kNone) return Tensor();
        Tensor t = shortcut == kTensor ? *residual : x;
        if (average) t = average->average(t);
        if (shortcut == kPad) t = padded(pixels(t), channels, format);
        return t.contiguous(format);
    }
    // The pixels of t that the shortcut "pad" reads.
    Tensor pixels(const Tensor& t) const { return every(t, stride); }
};

// The chains of a row and the number of its parameters.
std::pair<std::vector<Chain>, int64_t> read_chains(const Tensor& ints, const Tensor& reals) {
    Reader from(ints, reals);
    std::vector<Chain> chains;
    int64_t count = 0;
    for (int64_t n = from.next(); n > 0; n--) chains.emplace_back(from, count);
    return {std::move(chains), count};
}

// The chains with all their tensors.
std::vector<Chain> read_chains(const Tensor& ints, const Tensor& reals, TensorList params) {
    auto [chains, count] = read_chains(ints, reals);
    FR_CHECK(count == int64_t(params.size()), "params: expected ", count, " tensors, got ", params.size());
    for (Chain& chain : chains)
        for (Unit& u : chain.units)
            for (int p = 0; p < kParams; p++)
                if (u.place[p] >= 0) u.tensors[p] = params[u.place[p]];
    return std::move(chains);
}

}  // namespace

}  // namespace fused_resnet::cpu
