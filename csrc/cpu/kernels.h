// The CPU kernels on raw pointers: one table of functions per instruction set. The library's first use chooses a table.
//
// Kernels see a tensor [N, C, H, W] as `blocks` runs of memory. channels_last: a block is a row of C values (a pixel).
// NCHW: a block is a plane of H*W values of one channel. Every function works on blocks [begin, end); the callers split
// the range over threads. Per-channel vectors are float (double for double tensors).
#pragma once

#include <cstdint>

// every call that passes these vectors is inlined, so their ABI doesn't matter
#pragma GCC diagnostic ignored "-Wpsabi"

#include "../bn_math.h"
#include "../dtype.h"

namespace fused_resnet::cpu {

struct Layout {
    int64_t channels;
    int64_t plane;  // H*W for NCHW, 0 for channels_last
};

// A unit's BatchNorm and what is added before the activation.
struct Affine {
    const void* scale = nullptr;
    const void* shift = nullptr;
    const void* center = nullptr;  // the mean, for sums
};

struct Args {
    Layout layout;
    DType y_type;      // of y and residual
    DType other_type;  // of out / dout / dz / dy
    DType grad_type;   // of grad in bn_backward: y's type, or float (double)
    Act act = Act::identity;
    double act_param = 0;
    const void* y = nullptr;
    const void* residual = nullptr;  // null: none
    Affine norm;
    Affine residual_norm;         // scale null: the residual is added as it is
    const void* grad = nullptr;   // dout or dz
    void* out = nullptr;          // out, dz or dy; may be grad
    const void* coef[3] = {};     // A, B, C of dy; B null when BatchNorm is frozen
    void* sums[3] = {};           // [chunks or blocks, C]: sum dz, sum dz (y - center), sum dz (residual - its center)
};

// A max-pool after bn_act, and its image. `begin` and `end` count rows of images (N*oH; N*H in the backward).
struct Pool {
    int64_t height, width, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2];
    uint8_t* argmax;  // position in the window, row-major
};

// A 3x3, stride-1 convolution by Winograd's F(MxM, 3x3): (M+2)^2 matrix products turn (M+2)^2 inputs into MxM outputs.
struct Winograd {
    int tile;  // M: 2 or 4
    int64_t height, width, out_height, out_width, tiles_h, tiles_w, padding;
    int64_t first, count;  // the tiles of this slice, whose transforms are [(M+2)^2, count, channels]
};

// A convolution with weights [out_channels / kDirectBlock, kernel, channels, kDirectBlock].
struct Direct {
    int64_t height, width, channels, out_height, out_width, out_channels;
    int64_t kernel[2], stride[2], padding[2];
    const void* weight;
};
constexpr int kDirectBlock = 64, kPoolRows = 16;  // of channels; the most rows of a pool's window

struct Table {
    // out = act(z); bytes: y (+ residual) read, out written
    void (*bn_act)(const Args&, int64_t begin, int64_t end);
    // dz = grad act'(z) to out and the sums of this range to sums; bytes: grad, y (+ residual) read, dz written
    void (*bn_act_backward)(const Args&, int64_t begin, int64_t end);
    // dy = A dz + B (y - center) + C to out; bytes: dz, y read, dy written
    void (*bn_backward)(const Args&, int64_t begin, int64_t end);
    // mean and M2 of blocks [begin, end) to sums[0], sums[1]. If out (other_type) is given, y is first rounded into it
    void (*moments)(const Args&, int64_t begin, int64_t end);
    // out = max over windows of act(z), and its position; bytes: y read, out and one byte per output written
    void (*bn_act_max_pool)(const Args&, const Pool&, int64_t begin, int64_t end);
    // dz = act'(z) * (grad of the windows whose maximum is here), and sums; bytes: y, grad, argmax read, dz written
    void (*bn_act_max_pool_backward)(const Args&, const Pool&, int64_t begin, int64_t end);
    // Winograd, on channels_last; compute in float. V = B'dB of tiles [begin, end) of act(z) (raw y without norm)
    void (*winograd_input)(const Args&, const Winograd&, float* v, int64_t begin, int64_t end);
    // out = act(scale A'mA + shift (+ residual)): without scale where it is null, the bare A'mA where norm.shift is
    void (*winograd_output)(const Args&, const Winograd&, const float* m, int64_t begin, int64_t end);
    // U = GgG' [(M+2)^2, K, C] of rows [begin, end) of weights [K, 3, 3, C], turned by 180 degrees if flip
    void (*winograd_weight)(int tile, const float* weight, float* u, int64_t out_channels, int64_t channels, bool flip, int64_t begin,
                            int64_t end);
    // out = max-pool(act(conv(y) + shift)), rows [begin, end) of N*oH, in float; bytes: y read, out written.
    // scratch: kernel rows of the padded image, and as many rows of the convolution's output as a window of the pool
    void (*stem)(const Args&, const Direct&, const Pool&, float* scratch, int64_t begin, int64_t end);
    // out = act(y W + shift (+ residual)), a 1x1 convolution, pixels [begin, end), in float; bytes: y (+ residual) read,
    // out written
    void (*pointwise)(const Args&, const Direct&, int64_t begin, int64_t end);
    const char* name;
    int registers;  // the number of 64-byte vectors that the instruction set's registers hold
};

extern const Table table_default, table_avx2, table_avx512;

// The table for this machine, at most FUSED_RESNET_CPU_ISA (default, avx2, avx512).
const Table& table();

}  // namespace fused_resnet::cpu
