// The CPU kernels on raw pointers: one table of functions per instruction set. The library's first use chooses a table.
//
// Kernels see a tensor [N, C, H, W] as `blocks` runs of memory. channels_last: a block is a row of C values (a pixel).
// NCHW: a block is a plane of H*W values of one channel. Every function works on blocks [begin, end); the callers split
// the range over threads. Per-channel vectors are float (double for double tensors).
#pragma once

#include <cstdint>

// every call that passes these vectors is inlined, so their ABI doesn't matter
#pragma GCC diagnostic ignored "-Wpsabi"

#include "../../bn_math.h"
#include "../../dtype.h"

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
    DType other_type;  // of out / dz / dy
    DType grad_type;   // of grad: other_type, or float; in bn_backward y's type, or float (double)
    Act act = Act::identity;
    double act_param = 0;
    const void* y = nullptr;
    const void* residual = nullptr;  // null: none
    Affine norm;
    Affine residual_norm;        // scale null: the residual is added as it is
    const void* grad = nullptr;  // dout or dz
    void* out = nullptr;         // out, dz or dy; may be grad
    const void* coef[3] = {};    // A, B, C of dy; B null when BatchNorm is frozen
    void* sums[3] = {};          // [chunks or blocks, C]: sum dz, sum dz (y - center), sum dz (residual - its center)
};

// A max-pool after bn_act, and its image. `begin` and `end` count rows of images (N*oH; N*H in the backward).
struct Pool {
    int64_t height, width, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2];
    uint8_t* argmax;  // position in the window, row-major
};

// At least so many floats, an odd number of cache lines: equal places of matrices at this distance are in different
// sets of a cache.
inline int64_t odd_lines(int64_t floats) { return (floats + 15) / 16 / 2 * 32 + 16; }

// A 3x3, stride-1 convolution by Winograd's F(MxM, 3x3): (M+2)^2 matrix products turn (M+2)^2 inputs into MxM outputs.
struct Winograd {
    int tile;  // M: 2 or 4
    int64_t height, width, out_height, out_width, tiles_h, tiles_w, padding;
    int64_t out_row;       // values from one pixel of the output to the next
    int64_t first, count;  // the tiles of this slice, whose transforms are (M+2)^2 matrices [count, channels]

    // Values from one of the matrices to the next.
    int64_t matrix(int64_t channels) const { return odd_lines(count * channels); }
};

// Weights [K, 3, 3, row], of which the first `channels` values of a row are transformed, turned by 180 degrees if flip,
// to u[product * matrix + k * u_row + c].
struct WinogradWeight {
    int tile;
    const float* weight;
    int64_t row, channels;
    float* u;
    int64_t matrix, u_row;
    bool flip;
};

// A stem's convolution with weights [out_channels / kStemBlock, kernel[0], words of a run of kernel[1] * channels,
// kStemBlock, elements of a word]; words as GemmKernel's of the images' type.
struct Stem {
    int64_t height, width, channels, out_height, out_width, out_channels;
    int64_t kernel[2], stride[2], padding[2];
    const void* weight;
};
constexpr int kStemBlock = 32, kPoolRows = 16;  // of channels; the most rows of a pool's window

// The values that a convolution's kernel sees at each pixel of the output, a row [kernel, channels] per pixel; 0
// outside the image x [images, height, width, channels].
struct Patches {
    const void* x;
    int64_t height, width, channels, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
};

constexpr int kDepthwiseBlock = 64;  // channels of a depthwise convolution that one part of its loop computes

// C[rows, columns] (+)= A[rows, depth] B[depth, columns], sums in float, operands of the type of a GemmKernel.
struct Gemm {
    int64_t rows, columns, depth;
    const void* a;  // A[i, k] at i * a_row + k * a_depth
    int64_t a_row, a_depth;
    const void* b;  // in panels: [panels of GemmKernel::columns, words of depth, columns, elements of a word]
    float* c;       // null: C is not stored, only what the epilogue makes of it
    int64_t c_row;
    bool accumulate;
    const Patches* patches = nullptr;  // A in the place of a
    bool transposed = false;           // A is the patches' transpose, a column per pixel
    int64_t a_start = 0;               // the pixel of its first column
    // out = act(C + norm.shift (+ residual)), elements of A's type in rows of layout.channels; out may be C
    const Args* epilogue = nullptr;
};
// B's panels from B[k, j] at (k - first) * row + j * column; 0 where the last panel has no columns, the last word no
// elements.
struct GemmPack {
    int64_t depth, columns;
    const void* from;
    int64_t row, column;
    void* to;
    int64_t first = 0;
};
// Rows of A per block, whole tiles of 6 and of 14; the words of depth that pass at most while a tile's sums are in
// registers; the words of a block's copy, behind which a block's sums are where they are not stored.
constexpr int64_t kGemmBlock = 126, kMostGemmDepth = 256, kGemmScratch = kGemmBlock * (kMostGemmDepth + 4);
// Words of the patches that a block of their transpose is copied from.
constexpr int64_t kGemmPatches = kGemmBlock * kMostGemmDepth;

// Products of matrices with elements of one type. A word, 32 bits, holds elements of adjacent depth.
struct GemmKernel {
    int rows, columns;  // of a tile
    int word;           // elements of a word
    // rows [row_begin, row_end) of panels [begin, end) of C; scratch: kGemmScratch words, and kGemmBlock *
    // odd_lines(columns of the panels) where C is not stored, or kGemmPatches where A is transposed patches;
    // bytes: A, B read, C written (and read) once per kMostGemmDepth words of depth; A's patches copied
    void (*gemm)(const Gemm&, float* scratch, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end);
    // depths [depth_begin, depth_end), whole words but for the last, of panels [begin, end); bytes: B read, the panels
    // written
    void (*pack)(const GemmPack&, int64_t depth_begin, int64_t depth_end, int64_t begin, int64_t end);
};

struct Table {
#define FR_KERNEL(name, ...) void (*name)(__VA_ARGS__);
#include "kernels.inc"
    const char* name;
    int registers;  // of vectors
    GemmKernel float_gemm;
    GemmKernel bf16_gemm;  // A in bfloat16; B too, or, where a word is one element, in float
};

extern const Table table_default, table_avx2, table_avx512, table_avx512_bf16;

// The table for this machine, at most FUSED_RESNET_CPU_ISA (default, avx2, avx512, avx512_bf16).
const Table& table();
// Whether the processor multiplies tiles of bfloat16 (AMX).
bool has_amx_bf16();

}  // namespace fused_resnet::cpu
