// From types to templates: the kernels behind a Table, written once and compiled by one file per instruction set.
#pragma once

#include "norm.h"
#include "pool.h"
#include "winograd.h"
#include "stem.h"
#include "gemm.h"
#include "depthwise.h"
#include "excitation.h"

namespace {

template <class T>
struct Tag {
    using type = T;
};

template <class F>
FR_INLINE void by_types(DType y, DType other, F f) {
    if (y == DType::f64) return f(Tag<double>{}, Tag<double>{});
    if (y == DType::f32) return f(Tag<float>{}, Tag<float>{});
    if (y == DType::bf16 && other == DType::f32) return f(Tag<bf16>{}, Tag<float>{});
    if (y == DType::bf16) return f(Tag<bf16>{}, Tag<bf16>{});
    if (other == DType::f32) return f(Tag<_Float16>{}, Tag<float>{});
    f(Tag<_Float16>{}, Tag<_Float16>{});
}

// identity and relu have separate loops. The other activations are chosen inside the loop, where their exp costs more.
template <class F>
FR_INLINE void by_act(Act a, F f) {
    if (a == Act::identity) return f(Tag<Fixed<Act::identity>>{});
    if (a == Act::relu) return f(Tag<Fixed<Act::relu>>{});
    f(Tag<Chosen>{});
}

void bn_act_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, begin,
                                                                                                            end);
        });
    });
}
void bn_act_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            using T = typename decltype(t)::type;
            using O = typename decltype(o)::type;
            using K = typename decltype(k)::type;
            if (a.grad_type == a.other_type) bn_act_backward_impl<T, O, O, K>(a, begin, end);
            else bn_act_backward_impl<T, typename Lanes<T>::scalar, O, K>(a, begin, end);
        });
    });
}
void bn_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        bn_backward_impl<typename decltype(t)::type, typename decltype(o)::type>(a, begin, end);
    });
}
// f for types of which either may be float
template <class F>
FR_INLINE void by_conversion(DType y, DType other, F f) {
    if (y == DType::f32 && other == DType::bf16) return f(Tag<float>{}, Tag<bf16>{});
    if (y == DType::f32 && other == DType::f16) return f(Tag<float>{}, Tag<_Float16>{});
    by_types(y, other, f);
}
void convert_any(const Args& a, int64_t begin, int64_t end) {
    by_conversion(a.y_type, a.other_type, [&](auto t, auto o) {
        convert_impl<typename decltype(t)::type, typename decltype(o)::type>(a, begin, end);
    });
}
void moments_any(const Args& a, int64_t begin, int64_t end) {
    by_conversion(a.y_type, a.other_type, [&](auto t, auto o) {
        moments_impl<typename decltype(t)::type, typename decltype(o)::type>(a, begin, end);
    });
}
void bn_act_max_pool_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(
                a, q, begin, end);
        });
    });
}
void bn_act_max_pool_backward_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_backward_impl<typename decltype(t)::type, typename decltype(o)::type,
                                          typename decltype(k)::type>(a, q, begin, end);
        });
    });
}

template <class F>
FR_INLINE void by_float_type(DType t, F f) {
    if (t == DType::bf16) return f(Tag<bf16>{});
    if (t == DType::f16) return f(Tag<_Float16>{});
    f(Tag<float>{});
}
template <class F>
FR_INLINE void by_tile(int tile, F f) {
    if (tile == 4) return f(std::integral_constant<int, 4>{});
    f(std::integral_constant<int, 2>{});
}
void winograd_input_any(const Args& a, const Winograd& q, float* v, int64_t begin, int64_t end) {
    by_tile(q.tile, [&](auto m) {
        by_float_type(a.y_type, [&](auto t) {
            by_act(a.act, [&](auto k) {
                winograd_input_impl<m, typename decltype(t)::type, typename decltype(k)::type>(a, q, v, begin, end);
            });
        });
    });
}
void winograd_output_any(const Args& a, const Winograd& q, const float* product, int64_t begin, int64_t end) {
    by_tile(q.tile, [&](auto m) {
        by_float_type(a.other_type, [&](auto t) {
            by_act(a.act, [&](auto k) {
                winograd_output_impl<m, typename decltype(t)::type, typename decltype(k)::type>(a, q, product, begin,
                                                                                                end);
            });
        });
    });
}
void winograd_weight_any(const WinogradWeight& q, int64_t begin, int64_t end) {
    by_tile(q.tile, [&](auto m) { winograd_weight_impl<m>(q, begin, end); });
}
void winograd_output_gradient_any(const float* dy, const Winograd& q, float* m, int64_t K, int64_t begin, int64_t end) {
    by_tile(q.tile, [&](auto t) { winograd_output_gradient_impl<t>(dy, q, m, K, begin, end); });
}
void winograd_weight_gradient_any(int tile, const float* u, int64_t matrix, float* dw, int64_t C, int64_t begin,
                                  int64_t end) {
    by_tile(tile, [&](auto t) { winograd_weight_gradient_impl<t>(u, matrix, dw, C, begin, end); });
}
// f for the types of a frozen row's images
template <class F>
FR_INLINE void by_row_type(DType t, F f) {
    if (t == DType::bf16) return f(Tag<bf16>{});
    f(Tag<float>{});
}
void stem_any(const Args& a, const Stem& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    by_row_type(a.y_type, [&](auto t) { stem_impl<typename decltype(t)::type>(a, q, pool, scratch, begin, end); });
}
void depthwise_any(const Args& a, const Patches& q, const float* weight, int64_t begin, int64_t end) {
    by_row_type(a.y_type, [&](auto t) { depthwise_impl<typename decltype(t)::type>(a, q, weight, begin, end); });
}
void grouped_any(const Args& a, const Patches& q, const void* weight, int64_t groups, float* scratch, int64_t begin,
                 int64_t end) {
    by_row_type(a.y_type,
                [&](auto t) { grouped_impl<typename decltype(t)::type>(a, q, weight, groups, scratch, begin, end); });
}
void channel_sums_any(const void* x, DType type, int64_t channels, float* sums, int64_t begin, int64_t end) {
    by_row_type(type, [&](auto t) {
        channel_sums_impl(static_cast<const typename decltype(t)::type*>(x), channels, sums, begin, end);
    });
}
void scale_rows_any(void* x, DType type, int64_t channels, const float* factors, int64_t begin, int64_t end) {
    by_row_type(type, [&](auto t) {
        scale_rows_impl(static_cast<typename decltype(t)::type*>(x), channels, factors, begin, end);
    });
}

}  // namespace
