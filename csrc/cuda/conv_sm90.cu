// Chooses among CUTLASS's sm_90 convolutions, which conv_sm90_*.cu compile.
#include "conv_sm90.h"

namespace fused_resnet::cuda {
namespace {

using cutlass::bfloat16_t;
using cutlass::half_t;

template <class Tensors>
struct Instance {
    ConvType type;
    ConvTile tile;
    cudaError_t (*run)(const ConvProblem&, const Tensors&, cudaStream_t);
};

// For each type, the largest tile first.
constexpr Instance<ConvInference> kFprop[] = {
    {ConvType::bf16, {128, 128}, fprop_sm90<bfloat16_t, 128, 128>},
    {ConvType::bf16, {128, 64}, fprop_sm90<bfloat16_t, 128, 64>},
    {ConvType::bf16, {64, 64}, fprop_sm90<bfloat16_t, 64, 64>},
    {ConvType::f16, {128, 128}, fprop_sm90<half_t, 128, 128>},
    {ConvType::f16, {128, 64}, fprop_sm90<half_t, 128, 64>},
    {ConvType::f16, {64, 64}, fprop_sm90<half_t, 64, 64>},
    {ConvType::tf32, {128, 128}, fprop_sm90<float, 128, 128>},
    {ConvType::tf32, {64, 64}, fprop_sm90<float, 64, 64>},
};
constexpr Instance<ConvDgrad> kDgrad[] = {
    {ConvType::bf16, {128, 128}, dgrad_sm90<bfloat16_t, 128, 128>},
    {ConvType::bf16, {128, 64}, dgrad_sm90<bfloat16_t, 128, 64>},
    {ConvType::f16, {128, 128}, dgrad_sm90<half_t, 128, 128>},
    {ConvType::f16, {128, 64}, dgrad_sm90<half_t, 128, 64>},
};
constexpr Instance<ConvWgrad> kWgrad[] = {
    {ConvType::bf16, {128, 128}, wgrad_sm90<bfloat16_t, 128, 128>},
    {ConvType::bf16, {64, 64}, wgrad_sm90<bfloat16_t, 64, 64>},
    {ConvType::f16, {128, 128}, wgrad_sm90<half_t, 128, 128>},
    {ConvType::f16, {64, 64}, wgrad_sm90<half_t, 64, 64>},
};

template <class Tensors, int Count>
int tiles(const Instance<Tensors> (&instances)[Count], ConvType type, ConvTile* to) {
    int found = 0;
    for (const auto& i : instances)
        if (i.type == type && found < kConvTiles) to[found++] = i.tile;
    return found;
}

template <class Tensors, int Count>
cudaError_t run(const Instance<Tensors> (&instances)[Count], const char* why_not, const ConvProblem& g, ConvTile tile,
                const Tensors& tensors, cudaStream_t stream) {
    if (why_not != nullptr) return cudaErrorNotSupported;
    for (const auto& i : instances)
        if (i.type == g.type && i.tile.m == tile.m && i.tile.n == tile.n) return i.run(g, tensors, stream);
    return cudaErrorNotSupported;
}

// The cases that TMA's im2col can't express: see CU_TENSOR_MAP's limits for tensors of four axes.
const char* refused(const ConvProblem& g) {
    const int align = 16 / g.itemsize();
    if (g.c % align != 0 || g.k % align != 0)
        return "the sm_90 convolutions take channels that are a multiple of 8 (4 in float32), for TMA";
    if (g.stride_h > 8 || g.stride_w > 8) return "the sm_90 convolutions take strides of at most 8, for TMA";
    const auto far = [](int reach, int pad) { return reach > 127 || pad > 127; };
    if (far(g.dil_h * (g.r - 1), g.pad_h) || far(g.dil_w * (g.s - 1), g.pad_w))
        return "the sm_90 convolutions take paddings and kernels (dilation included) of at most 127 pixels, for TMA";
    if (g.c < 1 || g.k < 1 || g.n < 1 || g.p() < 1 || g.q() < 1)
        return "the sm_90 convolutions take at least one pixel and one channel";
    if (g.pixels() >= int64_t{1} << 31 || int64_t{g.n} * g.h * g.w >= int64_t{1} << 31)
        return "the sm_90 convolutions take fewer than 2^31 pixels";
    return nullptr;
}

const char* refused_backward(const ConvProblem& g) {
    if (g.type == ConvType::tf32) return "the sm_90 backward convolutions take bfloat16 and float16, not float32";
    if (g.stride_h != 1 || g.stride_w != 1) return "the sm_90 backward convolutions take stride 1";
    return refused(g);
}

}  // namespace

const char* conv_fprop_sm90_why_not(const ConvProblem& g) { return refused(g); }
const char* conv_dgrad_sm90_why_not(const ConvProblem& g) {
    if (g.pad_h > g.dil_h * (g.r - 1) || g.pad_w > g.dil_w * (g.s - 1))
        return "the sm_90 input gradient takes paddings smaller than the kernel";
    return refused_backward(g);
}
const char* conv_wgrad_sm90_why_not(const ConvProblem& g) { return refused_backward(g); }

int conv_fprop_sm90_tiles(ConvType type, ConvTile* to) { return tiles(kFprop, type, to); }
int conv_dgrad_sm90_tiles(ConvType type, ConvTile* to) { return tiles(kDgrad, type, to); }
int conv_wgrad_sm90_tiles(ConvType type, ConvTile* to) { return tiles(kWgrad, type, to); }

cudaError_t conv_fprop_sm90(const ConvProblem& g, ConvTile tile, const ConvInference& t, cudaStream_t stream) {
    return run(kFprop, conv_fprop_sm90_why_not(g), g, tile, t, stream);
}
cudaError_t conv_dgrad_sm90(const ConvProblem& g, ConvTile tile, const ConvDgrad& t, cudaStream_t stream) {
    return run(kDgrad, conv_dgrad_sm90_why_not(g), g, tile, t, stream);
}
cudaError_t conv_wgrad_sm90(const ConvProblem& g, ConvTile tile, const ConvWgrad& t, cudaStream_t stream) {
    return run(kWgrad, conv_wgrad_sm90_why_not(g), g, tile, t, stream);
}

}  // namespace fused_resnet::cuda
