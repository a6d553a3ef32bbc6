// The windows of a pool that cover a position, on host and device.
#pragma once

#include "bn_math.h"

namespace fused_resnet {

// Windows o, first <= o <= last, with o*stride - padding <= i < o*stride - padding + kernel, of `count` windows.
template <class I>
struct Span {
    I first, last;
};
template <class I>
FR_INLINE Span<I> windows(I i, I kernel, I stride, I padding, I count) {
    const I up = i + padding, last = up / stride;
    return {up < kernel ? 0 : (up - kernel) / stride + 1, last < count ? last : count - 1};
}

}  // namespace fused_resnet
