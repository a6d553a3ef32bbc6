// Activations as parameters of kernels: fixed at compile time, or chosen at each call of `with`.
#pragma once

#include "vectors.h"

namespace {

template <Act A>
struct Fixed {
    FR_INLINE explicit Fixed(Act) {}
    // f(the activation), so that a loop in f does not choose again and again
    template <class F>
    FR_INLINE auto with(F f) const {
        return f(*this);
    }
    template <class V>
    FR_INLINE V forward(V z, V p) const {
        return act<A>(z, p);
    }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const {
        return act_backward<A>(g, z, p);
    }
};
struct Chosen {
    Act chosen;
    FR_INLINE explicit Chosen(Act a) : chosen(a) {}
    template <class F>
    FR_INLINE auto with(F f) const {
        switch (chosen) {
            case Act::relu: return f(Fixed<Act::relu>(chosen));
            case Act::leaky_relu: return f(Fixed<Act::leaky_relu>(chosen));
            case Act::elu: return f(Fixed<Act::elu>(chosen));
            case Act::sigmoid: return f(Fixed<Act::sigmoid>(chosen));
            case Act::silu: return f(Fixed<Act::silu>(chosen));
            case Act::relu6: return f(Fixed<Act::relu6>(chosen));
            case Act::hardswish: return f(Fixed<Act::hardswish>(chosen));
            default: return f(Fixed<Act::identity>(chosen));
        }
    }
    template <class V>
    FR_INLINE V forward(V z, V p) const {
        return with([&](auto k) __attribute__((always_inline)) { return k.forward(z, p); });
    }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const {
        return with([&](auto k) __attribute__((always_inline)) { return k.backward(g, z, p); });
    }
};

}  // namespace
