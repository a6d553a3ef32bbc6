// Convolutions of a frozen row that pass through an image together, some of its rows at a time, so that what is between
// them stays in the cache of a core: a 1x1 convolution, a depthwise one, and perhaps a 1x1 convolution after it.
// Source: Sandler et al., MobileNetV2 (arXiv 1801.04381), section 5.1, which computes the expanded image in parts.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

// A convolution's packed weight, its bias and the activation.
struct Packed {
    const Tensor &weight, &bias;
    int64_t act;
    double act_param;
};

// Whether an image [N, channels, H, W] between two convolutions, N, H, W and dtype x's, is too large for the caches of
// the threads' cores.
bool bands_suit(const Tensor& x, int64_t channels);

// act(conv1x1(x) + bias), a depthwise convolution of it, and then, if `narrow` is given, act(conv1x1(.) + bias (+
// residual)). The same values as of one after the other. owned: the residual's memory may be overwritten.
Tensor in_bands(const Tensor& x, const Packed& wide, const Packed& depthwise, IntList stride, IntList padding,
                IntList dilation, const Packed* narrow, const OptTensor& residual, bool owned);

}  // namespace fused_resnet::cpu
