// The three convolutions of CUTLASS 3.x on sm_90a, one template:
//     fprop  y[n, p, q, k] = act(bias[k] + residual[n, p, q, k] + sum over (r, s, c) of
//                                x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[k, r, s, c])
//     dgrad  dx = the gradient of the same sum with respect to x [+ add]
//     wgrad  dw = the gradient of the same sum with respect to w, float32
//
// Tile: M rows by N columns by 128 bytes of the sum, with one consumer warp group. TMA im2col loads one operand, plain
// TMA the other. wgmma reads both from shared memory. There are as many stages as fit, and up to three blocks per
// processor for the small tiles. Epilogue of fprop: a visitor tree, (acc + bias) + beta * residual, then act. Without a
// residual beta is 0 and nothing is loaded. dgrad adds in the same way.
// Traffic: the operands once (from L2 for all but the first tile of a row or column), the result once, residual or add
// once, if given.
// Source: CUTLASS 3.x, implicit GEMM for sm_90 and example 76; Chetlur et al. 2014, arXiv 1410.0759.
//
// To be measured on a GPU: correctness against the reference first; each tile against cuDNN on ResNet-50's layers; the
// runtime switch over act (192 registers instead of 160) against a compiled one; stages against blocks per processor;
// and the number of tiles above which wgrad, which does not split its sum, pays.
#pragma once

#ifndef NDEBUG
#error "compile with -DNDEBUG: with CUTLASS's assertions ptxas serializes every wgmma"
#endif

#include <cute/tensor.hpp>  // these two first: the others do not include all that they use
#include <cutlass/kernel_hardware_info.hpp>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/util/packed_stride.hpp>
#include <type_traits>

#include "acts.cuh"
#include "conv_sm90.h"

namespace fused_resnet::cuda {

struct ActArguments {
    Act act;
    float param;
};

// act is chosen at run time: one compilation per activation would take too long.
template <class Fragment>
struct RuntimeAct {
    using Arguments = ActArguments;
    template <Act A>
    static CUTLASS_DEVICE void apply(Fragment& z, float param) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Fragment::kElements; ++i) z[i] = fused_resnet::act<A>(z[i], param);
    }
    CUTLASS_DEVICE Fragment operator()(Fragment z, ActArguments args) const {
        switch (args.act) {
#define FR_CASE(name) \
    case Act::name: apply<Act::name>(z, args.param); break;
            FR_COMMON_ACTS(FR_CASE)
#undef FR_CASE
            default:
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < Fragment::kElements; ++i) z[i] = called_act(args.act, z[i], args.param);
        }
        return z;
    }
};

template <class T>
using LinearCombination = cutlass::epilogue::fusion::LinearCombination<T, float, T, float>;

// act((acc + bias) + beta * residual)
template <class T, class Tile>
struct InferenceTree {
    template <template <class> class F, class Out = float>
    using Compute = cutlass::epilogue::fusion::Sm90Compute<F, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;
    using Biased = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::plus>,
                                                      cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>,
                                                      cutlass::epilogue::fusion::Sm90AccFetch>;
    using Summed = cutlass::epilogue::fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add>,
                                                      cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>,
                                                      cutlass::epilogue::fusion::Sm90SrcFetch<T>, Biased>;
    using type = cutlass::epilogue::fusion::Sm90EVT<Compute<RuntimeAct, T>, Summed>;
};

template <cutlass::conv::Operator Op, class T, int M, int N>
struct ConvSm90 {
    static constexpr bool kFprop = Op == cutlass::conv::Operator::kFprop;
    static constexpr bool kWgrad = Op == cutlass::conv::Operator::kWgrad;
    using Out = std::conditional_t<kWgrad, float, T>;
    using K = cute::Int<128 / sizeof(T)>;  // one row of the 128-byte swizzle
    using FlatTile = cute::Shape<cute::Int<M>, cute::Int<N>, K>;
    // the axis that runs over taps and channels is a tuple
    using Tile = std::conditional_t<kWgrad, cute::Shape<cute::Int<M>, cute::Shape<cute::Int<N>>, cute::Shape<K>>,
                                    cute::Shape<cute::Int<M>, cute::Int<N>, cute::Shape<K>>>;
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Layout = cutlass::layout::TensorNHWC;
    using OutLayout = std::conditional_t<kWgrad, cutlass::layout::TensorKCSR, Layout>;
    static constexpr int kAlign = 16 / sizeof(T), kOutAlign = 16 / sizeof(Out);
    static auto fusion() {
        if constexpr (kFprop) return typename InferenceTree<T, FlatTile>::type{};
        else return LinearCombination<Out>{};
    }

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, Out, OutLayout, kOutAlign, Out, OutLayout,
        kOutAlign, cutlass::epilogue::TmaWarpSpecialized, decltype(fusion())>::CollectiveOp;
    // Blocks are not persistent: if registers allow it, one computes while another stores. Each has its part of the
    // shared memory, minus CUDA's own part per block.
    static constexpr int kBlocks = M * N <= 64 * 64 ? 3 : M * N <= 128 * 64 ? 2 : 1;
    static constexpr int kMemory = cutlass::gemm::collective::detail::sm90_smem_capacity_bytes;
    static constexpr int kOwn = kBlocks == 1 ? kMemory : kMemory / kBlocks - 1024;
    static constexpr int kLeft = kMemory - kOwn + static_cast<int>(sizeof(typename Epilogue::SharedStorage));
    using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Op, T, Layout, kAlign, T, Layout, kAlign, float, Tile,
        Cluster, cutlass::conv::collective::StageCountAutoCarveout<kLeft>,
        cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
    using Shape = cutlass::conv::ConvProblemShape<Op, 2>;
    using Device =
        cutlass::conv::device::ConvUniversalAdapter<cutlass::conv::kernel::ConvUniversal<Shape, Mainloop, Epilogue>>;

    // a, b: the operands in CUTLASS's order. c: the summand, or nullptr.
    static cudaError_t run(const ConvProblem& g, const void* a, const void* b, const void* c, void* d,
                           const typename Epilogue::FusionCallbacks::Arguments& fused, cudaStream_t stream) {
        const Shape shape(cutlass::conv::Mode::kCrossCorrelation, {g.n, g.h, g.w, g.c}, {g.k, g.r, g.s, g.c},
                          {g.pad_h, g.pad_w}, {g.pad_h, g.pad_w}, {g.stride_h, g.stride_w}, {g.dil_h, g.dil_w}, 1);
        typename Device::Arguments args{};
        args.problem_shape = shape;
        args.mainloop = {static_cast<const T*>(a), static_cast<const T*>(b)};
        // a tensor map needs an address; with beta = 0 nothing is read through it
        args.epilogue.ptr_C = static_cast<const Out*>(c ? c : d);
        args.epilogue.ptr_D = static_cast<Out*>(d);
        if constexpr (kWgrad) {
            args.epilogue.dD = cutlass::make_cute_packed_stride(args.epilogue.dD, shape.shape_C, shape.stride_C, Op);
        } else {
            cute::for_each(cute::make_seq<3>{},
                           [&](auto i) { cute::get<0, i>(args.epilogue.dD) = shape.stride_C[2 - i]; });
        }
        args.epilogue.dC = args.epilogue.dD;
        args.epilogue.thread = fused;
        return Device().run(args, nullptr, stream) == cutlass::Status::kSuccess ? cudaSuccess : launch_error();
    }
};

template <class T, int M, int N>
cudaError_t fprop_sm90(const ConvProblem& g, const ConvInference& t, cudaStream_t stream) {
    // the tree from its leaves: {beta, residual, {bias, acc, +}, beta * residual + ...}, act
    return ConvSm90<cutlass::conv::Operator::kFprop, T, M, N>::run(
        g, t.x, t.w, t.residual, t.y,
        {{{{t.residual ? 1.0f : 0.0f}}, {}, {{t.bias}, {}, {}}, {}}, {t.act, t.act_param}}, stream);
}

template <class T, int M, int N>
cudaError_t dgrad_sm90(const ConvProblem& g, const ConvDgrad& t, cudaStream_t stream) {
    return ConvSm90<cutlass::conv::Operator::kDgrad, T, M, N>::run(g, t.dy, t.w, t.add, t.dx,
                                                                   {1.0f, t.add ? 1.0f : 0.0f}, stream);
}

template <class T, int M, int N>
cudaError_t wgrad_sm90(const ConvProblem& g, const ConvWgrad& t, cudaStream_t stream) {
    return ConvSm90<cutlass::conv::Operator::kWgrad, T, M, N>::run(g, t.dy, t.x, nullptr, t.dw, {1.0f, 0.0f}, stream);
}

}  // namespace fused_resnet::cuda
