// The checks of tensors for the operators of ops.cpp and conv_ops.cpp. Errors name the argument.
#pragma once

#include "ops.h"

namespace fused_resnet::cuda::ops {

// An uninitialised [N, C, H, W] tensor whose memory is NHWC for all sizes.
Tensor empty_nhwc(IntList nchw, const Options& options);

// t as NHWC memory.
Tensor nhwc(const char* name, const Tensor& t);

// Like nhwc, but checks that t has the shape, dtype and device of y, which the message calls `what`.
Tensor like(const char* name, const Tensor& t, const Tensor& y, const char* what = "y");

}  // namespace fused_resnet::cuda::ops
