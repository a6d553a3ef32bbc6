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

// The activations that are not common, one call per vector. Inlined into every kernel they would double the library.
template <class V>
__attribute__((noinline)) V called_forward(Act which, V z, V p) {
    switch (which) {
#define FR_CASE(name) \
    case Act::name: return act<Act::name>(z, p);
        FR_OTHER_ACTS(FR_CASE)
#undef FR_CASE
        default: return z;
    }
}
template <class V>
__attribute__((noinline)) V called_backward(Act which, V g, V z, V p) {
    switch (which) {
#define FR_CASE(name) \
    case Act::name: return act_backward<Act::name>(g, z, p);
        FR_OTHER_ACTS(FR_CASE)
#undef FR_CASE
        default: return g;
    }
}
struct Called {
    Act which;
    FR_INLINE explicit Called(Act a) : which(a) {}
    template <class V>
    FR_INLINE V forward(V z, V p) const {
        return called_forward(which, z, p);
    }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const {
        return called_backward(which, g, z, p);
    }
};

struct Chosen {
    Act chosen;
    FR_INLINE explicit Chosen(Act a) : chosen(a) {}
    template <class F>
    FR_INLINE auto with(F f) const {
        switch (chosen) {
#define FR_CASE(name) \
    case Act::name: return f(Fixed<Act::name>(chosen));
            FR_COMMON_ACTS(FR_CASE)
#undef FR_CASE
            default: return f(Called(chosen));
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
