// The activations that are not common, as calls: inlined, their formulas would take registers from all that a kernel
// chooses at run time.
#pragma once

#include "../bn_math.h"

namespace fused_resnet::cuda {

template <class A>
__device__ __noinline__ A called_act(Act which, A z, A p) {
    switch (which) {
#define FR_CASE(name) \
    case Act::name: return act<Act::name>(z, p);
        FR_OTHER_ACTS(FR_CASE)
#undef FR_CASE
        default: return z;
    }
}
template <class A>
__device__ __noinline__ A called_act_backward(Act which, A g, A z, A p) {
    switch (which) {
#define FR_CASE(name) \
    case Act::name: return act_backward<Act::name>(g, z, p);
        FR_OTHER_ACTS(FR_CASE)
#undef FR_CASE
        default: return g;
    }
}

}  // namespace fused_resnet::cuda
