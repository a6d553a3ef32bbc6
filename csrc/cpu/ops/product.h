// Products of float matrices by the micro-kernel of kernels/gemm.h.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

// Scratch of the calling thread, at least so many floats; it lives as long as the thread, and the next call hands out
// the same.
float* scratch(int64_t floats);

// [depth, columns] with any strides as panels, the right operand of a product.
Tensor pack(const Tensor& b);

// Depths [begin, end) of all panels.
void pack(const GemmPack& q, int64_t begin, int64_t end);

// C (+)= A B, split over threads. Takes `scratch` where a_depth is not 1.
void multiply(const Gemm& g);

// The panels that hold so many columns.
inline int64_t panels_of(int64_t columns) { return (columns + table().gemm_columns - 1) / table().gemm_columns; }

}  // namespace fused_resnet::cpu
