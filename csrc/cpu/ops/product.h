// Products of matrices by the micro-kernel of kernels/gemm.h.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

// Scratch of the calling thread, at least so many floats; it lives as long as the thread, and the next call hands out
// the same.
float* scratch(int64_t floats);

// scratch of the calling thread for GemmKernel::gemm: kGemmScratch words and `more`.
float* gemm_scratch(int64_t more = 0);

// Whether the processor multiplies bfloat16, and what images of a dtype are multiplied in.
bool multiplies_bf16();
ScalarType multiplied_as(ScalarType dtype);

// The kernel for products of matrices of this dtype, whose results are float. Null: ATen has the products.
const GemmKernel* gemm_kernel_of(ScalarType dtype);

// The panels that hold so many columns, and the bytes of a right operand [depth, columns] in panels.
int64_t panels_of(const GemmKernel& kernel, int64_t columns);
int64_t panels_bytes(const GemmKernel& kernel, int64_t depth, int64_t columns);

// Weights [blocks, R, S, C, columns] for direct convolutions: each run of S * C values in whole words of what images of
// their dtype are multiplied in, a word's elements side by side. The result has the same sizes, and strides that name
// where its runs begin.
Tensor pack_runs(const Tensor& weight);
bool is_packed_runs(const Tensor& packed, ScalarType images);

// The kernel for convolutions of frozen images of a dtype; whether a weight of so many output channels is packed for
// it.
const GemmKernel& frozen_kernel(ScalarType images);
void check_panels(const Tensor& packed, int64_t channels, ScalarType images);

// A matrix in memory, with any strides.
struct Matrix {
    void* data;
    int64_t rows, columns, row, column;
};

// [depth, columns] as panels, the right operand of a product.
Memory pack(const GemmKernel& kernel, const Matrix& b);

// Depths [begin, end) of all panels.
void pack(const GemmKernel& kernel, const GemmPack& q, int64_t begin, int64_t end);

// C (+)= A B, split over threads.
void multiply(const GemmKernel& kernel, const Gemm& g);
// The same for a right operand of this dtype in memory, which is packed part by part. g names no depth and no b.
void multiply_packing(const GemmKernel& kernel, Gemm g, const Matrix& b, ScalarType dtype);

}  // namespace fused_resnet::cpu
