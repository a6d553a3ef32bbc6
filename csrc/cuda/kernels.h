// The memory-bound CUDA kernels, with raw pointers, sizes and a stream: no torch header, no CUDA header.
//
// A tensor is [rows, channels] in memory, rows = N*H*W (NHWC). y, residual, grad and out have one dtype; per-channel
// vectors and sums are float (double for f64). Pointers and the number of channels may be any. If all pointers and rows
// are multiples of 16 bytes, accesses are 16 bytes wide, otherwise one element. No launcher waits, allocates or uses
// another stream. Each returns null, or CUDA's message if the launch failed. The device is the current one.
#pragma once

#include <cstdint>

#include "../bn_math.h"
#include "../dtype.h"

struct CUstream_st;

namespace fused_resnet::cuda {

using Stream = CUstream_st*;
using Status = const char*;

// A unit's BatchNorm.
struct Affine {
    const void* scale = nullptr;
    const void* shift = nullptr;
    const void* center = nullptr;  // the mean, for sums
};

struct Pass {
    DType dtype;
    int64_t rows, channels;
    Act act = Act::identity;
    double act_param = 0;
    const void* y = nullptr;
    const void* residual = nullptr;  // null: none
    Affine norm;
    Affine residual_norm;        // scale null: the residual is added as it is
    const void* grad = nullptr;  // dout or dz
    void* out = nullptr;         // out, dz or dy
    const void* coef[3] = {};    // A, B, C of dy; B null where BatchNorm is frozen
    // [partials, channels] each, one row per block: mean and M2, or sum dz, sum dz (y - center), sum dz (residual -
    // its center)
    void* partials[3] = {};
};

// A max-pool after bn_act: y is [images, height, width, channels], the output [images, out_height, out_width,
// channels].
struct Pool {
    int images, height, width, out_height, out_width;
    int kernel[2], stride[2], padding[2];
    uint8_t* argmax;  // position in the window, row-major
};

// The rows of partial results of a reduction, which `partials` holds. Each covers `each` rows, the last one the rest.
struct Split {
    int64_t partials, each;
};
Split bn_stats_split(const Pass&);
Split bn_act_backward_split(const Pass&);
int64_t bn_act_max_pool_backward_partials(const Pass&, const Pool&);

// Moments of ranges of rows.
Status bn_stats(const Pass&, Stream);
// Mean and biased variance from the moments of pieces; piece p covers rows [p*each, (p+1)*each) of `rows`. No rows:
// NaN.
Status merge_moments(DType, int64_t channels, int64_t rows, Split, const void* means, const void* m2s, void* mean,
                     void* var, Stream);
// out[k] = sum over the rows of in[k], k < kinds <= 3.
Status merge_sums(DType, int64_t channels, int64_t partials, int kinds, void* const in[3], void* const out[3], Stream);
// out = act(z)
Status bn_act(const Pass&, Stream);
// out = grad act'(z), and sums
Status bn_act_backward(const Pass&, Stream);
// out = A grad + B (y - center) + C
Status bn_backward(const Pass&, Stream);
// out = max over windows of act(z), and its position
Status bn_act_max_pool(const Pass&, const Pool&, Stream);
// out = act'(z) * (grad of the windows whose maximum is here), and sums
Status bn_act_max_pool_backward(const Pass&, const Pool&, Stream);

// BatchNorm's vectors, each of `channels` values: scale, shift, center, rstd. gamma, beta, conv_bias may be null.
Status bn_fold(DType, int64_t channels, const void* mean, const void* var, const void* gamma, const void* beta,
               const void* conv_bias, double eps, void* const out[4], Stream);
// dgamma, B, C of dy over `count` values; B and C are null if BatchNorm is frozen.
Status bn_coefficients(DType, int64_t channels, const void* scale, const void* rstd, const void* sum_dz,
                       const void* sum_dz_y, int64_t count, void* const out[3], Stream);

// out[n][column][row] = in[n][row][column] of elements of 1, 2, 4 or 8 bytes: NCHW <-> NHWC.
Status transpose(int element_size, int64_t images, int64_t rows, int64_t columns, const void* in, void* out, Stream);

// nvcc's CUDA version ("13.0"), and the reason why no kernel runs on the current device, or null.
const char* built_with();
Status usable();

}  // namespace fused_resnet::cuda
