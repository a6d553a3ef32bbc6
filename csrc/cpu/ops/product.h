// Products of matrices by the micro-kernel of kernels/gemm.h.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

// Scratch of the calling thread, at least so many floats; it lives as long as the thread, and the next call hands out
// the same.
float* scratch(int64_t floats);

// scratch of the calling thread for GemmKernel::gemm.
float* gemm_scratch();

// The kernel for products of matrices of this dtype, whose results are float. Null: ATen has the products.
const GemmKernel* gemm_kernel_of(at::ScalarType dtype);

// The panels that hold so many columns, and a right operand [depth, columns] in panels, whose values are undefined.
int64_t panels_of(const GemmKernel& kernel, int64_t columns);
Tensor empty_panels(const GemmKernel& kernel, int64_t depth, int64_t columns, const at::TensorOptions& options);

// [depth, columns] with any strides as panels, the right operand of a product.
Tensor pack(const GemmKernel& kernel, const Tensor& b);

// Depths [begin, end) of all panels.
void pack(const GemmKernel& kernel, const GemmPack& q, int64_t begin, int64_t end);

// C (+)= A B, split over threads.
void multiply(const GemmKernel& kernel, const Gemm& g);

}  // namespace fused_resnet::cpu
