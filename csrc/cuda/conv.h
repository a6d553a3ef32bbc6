// The convolutions of the CUDA part: problems, refusals and launchers. There is no torch header, so nvcc alone compiles
// the implementations. conv_ops.cpp checks tensors and allocates. No convolution needs scratch memory.
//
// Tensors are dense NHWC (x [N,H,W,C], y [N,P,Q,K]) and KRSC (w [K,R,S,C]), 16-byte aligned, without groups. Each
// launcher has a `*_why_not`, which returns why it can't take a case (a sentence for a user), or nullptr. The launcher
// returns cudaErrorNotSupported for a refused case, otherwise CUDA's status.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../bn_math.h"

namespace fused_resnet::cuda {

enum class ConvType : int { bf16, f16, tf32 };  // tf32: float32 tensors, products rounded to tf32

struct ConvProblem {
    int n, h, w, c;  // x
    int k, r, s;     // weight
    int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
    ConvType type;

    constexpr int p() const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
    constexpr int q() const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }
    constexpr int64_t pixels() const { return int64_t{n} * p() * q(); }
    constexpr int itemsize() const { return type == ConvType::tf32 ? 4 : 2; }
};

// A block of threads computes a tile of m rows (pixels; wgrad: output channels) by n columns (channels). The `*_tiles`
// functions write the tiles that are compiled for a type, at most kConvTiles, and return their number.
struct ConvTile {
    int m, n;
};
constexpr int kConvTiles = 4;

// Inference: y = act(conv(x, w) + bias [+ residual]), in float32 until y is rounded. sm_90a, conv_sm90.cuh.
struct ConvInference {
    const void *x, *w;
    const float* bias;     // [K], or nullptr: none
    const void* residual;  // as y, or nullptr: none
    Act act;
    float act_param;
    void* y;
};
int conv_fprop_sm90_tiles(ConvType, ConvTile*);
const char* conv_fprop_sm90_why_not(const ConvProblem&);
cudaError_t conv_fprop_sm90(const ConvProblem&, ConvTile, const ConvInference&, cudaStream_t);

// dx = the gradient by x, from dy [N,P,Q,K] [+ add, as x]; dw [K,R,S,C] = the gradient by w in float32. Stride 1.
// sm_90a, conv_sm90.cuh.
struct ConvDgrad {
    const void *dy, *w, *add;  // add: nullptr: none; may be dx
    void* dx;
};
struct ConvWgrad {
    const void *dy, *x;
    float* dw;
};
int conv_dgrad_sm90_tiles(ConvType, ConvTile*);
const char* conv_dgrad_sm90_why_not(const ConvProblem&);
cudaError_t conv_dgrad_sm90(const ConvProblem&, ConvTile, const ConvDgrad&, cudaStream_t);
int conv_wgrad_sm90_tiles(ConvType, ConvTile*);
const char* conv_wgrad_sm90_why_not(const ConvProblem&);
cudaError_t conv_wgrad_sm90(const ConvProblem&, ConvTile, const ConvWgrad&, cudaStream_t);

// y = conv(act(scale x + shift), w); scale nullptr: no prologue. Also, per tile of pixels and per channel, the mean of
// y and M2, the sum of squared deviations from that mean: [tiles, K], to be merged by Chan's formula. A tile has
// conv_train_sm90_rows() pixels, the last one fewer. sm_90a, conv_train_sm90.cu.
struct ConvTrain {
    const void *x, *w;
    const float *scale, *shift;  // [C], both or none, 16-byte aligned
    Act act;
    void* y;
    float *mean, *m2;
};
int conv_train_sm90_rows();
const char* conv_train_sm90_why_not(const ConvProblem&, Act);
cudaError_t conv_train_sm90(const ConvProblem&, const ConvTrain&, cudaStream_t);

}  // namespace fused_resnet::cuda
