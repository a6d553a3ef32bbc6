// The kernels, written once and compiled by one file per instruction set.
#pragma once

#include "vectors_impl.h"
#include "pool_impl.h"
#include "winograd_impl.h"
#include "direct_impl.h"

namespace {

// Calls body(offset, channel, n) for every vector of blocks [begin, end).
template <int L, class Body>
FR_INLINE void each(const Layout& layout, int64_t begin, int64_t end, Body body) {
    const int64_t size = layout.plane ? layout.plane : layout.channels;
    for (int64_t b = begin; b < end; b++) {
        int64_t i = 0;
        for (; i + L <= size; i += L) body(b * size + i, layout.plane ? b % layout.channels : i, L);
        if (i < size) body(b * size + i, layout.plane ? b % layout.channels : i, int(size - i));
    }
}

template <class T, class O, class K>
void bn_act_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    each<L>(a.layout, begin, end, [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
        store(out + off, k.forward(z_at<T>(a, load<V>(y + off, n), off, c, n), p), n);
    });
}

template <class T, class O>
void bn_backward_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const bool plane = a.layout.plane;
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    auto with = [&](auto grad) __attribute__((always_inline)) {
        each<L>(a.layout, begin, end, [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
            const V dz = load<V>(grad + off, n), ka = at<V, S>(a.coef[0], c, n, plane);
            if (!a.coef[1]) return store(out + off, ka * dz, n);
            store(out + off,
                  bn_backward(dz, load<V>(y + off, n), at<V, S>(a.norm.center, c, n, plane), ka,
                              at<V, S>(a.coef[1], c, n, plane), at<V, S>(a.coef[2], c, n, plane)),
                  n);
        });
    };
    // dz has y's type (a block's closing gradient), or the type in which convolutions are computed
    if (a.grad_type == a.y_type) with(static_cast<const T*>(a.grad));
    else with(static_cast<const typename Lanes<T>::scalar*>(a.grad));
}

// Kernels take rows in tiles, so that a channel's sums stay in registers and the rows in L1.
constexpr int64_t kTile = 16;

// Calls tile(channel, n, offset, count, stride) for runs of `count` vectors `stride` elements apart in one channel
// group. The caller flushes.
template <int L, class Body>
FR_INLINE void tiles(const Layout& layout, int64_t begin, int64_t end, Body body) {
    const int64_t C = layout.channels;
    for (int64_t b = begin; b < end; b += kTile) {
        const int64_t rows = end - b < kTile ? end - b : kTile;
        int64_t c = 0;
        for (; c + L <= C; c += L) body(c, L, b * C + c, rows);
        if (c < C) body(c, int(C - c), b * C + c, rows);
    }
}

template <class T, class G, class K>
void bn_act_backward_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const V p = splat<V>(a.act_param);
    const K k(a.act);
    const bool plane = a.layout.plane;
    const T* y = static_cast<const T*>(a.y);
    const T* residual = static_cast<const T*>(a.residual);
    const G* grad = static_cast<const G*>(a.grad);
    G* out = static_cast<G*>(a.out);
    const bool third = a.sums[2];
    S* sums[3] = {static_cast<S*>(a.sums[0]), static_cast<S*>(a.sums[1]), static_cast<S*>(a.sums[2])};
    V s0{}, s1{}, s2{};
    auto one = [&](int64_t off, int64_t c, int n) __attribute__((always_inline)) {
        const V v = load<V>(y + off, n);
        const V dz = k.backward(load<V>(grad + off, n), z_at<T>(a, v, off, c, n), p);
        store(out + off, dz, n);
        s0 = s0 + dz;
        s1 = s1 + dz * (v - at<V, S>(a.norm.center, c, n, plane));
        if (third) s2 = s2 + dz * (load<V>(residual + off, n) - at<V, S>(a.residual_norm.center, c, n, plane));
    };
    if (plane) {
        const int64_t size = a.layout.plane, C = a.layout.channels;
        for (int64_t b = begin; b < end; b++) {
            V t0{}, t1{}, t2{};
            int64_t i = 0;
            s0 = s1 = s2 = V{};
            for (; i + L <= size; i += L) one(b * size + i, b % C, L);
            t0 = s0, t1 = s1, t2 = s2;
            s0 = s1 = s2 = V{};
            const int n = int(size - i);
            if (n) one(b * size + i, b % C, n);
            sums[0][b] = total(t0, L) + total(s0, n);
            sums[1][b] = total(t1, L) + total(s1, n);
            if (third) sums[2][b] = total(t2, L) + total(s2, n);
        }
        return;
    }
    for (int64_t c = 0; c < a.layout.channels; c++)
        for (int i = 0; i < 2 + third; i++) sums[i][c] = 0;
    tiles<L>(a.layout, begin, end, [&](int64_t c, int n, int64_t off, int64_t rows) __attribute__((always_inline)) {
        s0 = s1 = s2 = V{};
        for (int64_t r = 0; r < rows; r++) one(off + r * a.layout.channels, c, n);
        store(sums[0] + c, load<V>(sums[0] + c, n) + s0, n);
        store(sums[1] + c, load<V>(sums[1] + c, n) + s1, n);
        if (third) store(sums[2] + c, load<V>(sums[2] + c, n) + s2, n);
    });
}

// y in T, rounded to O if it is stored. Two passes over a tile that stays in L1; tiles are merged by Chan's formula.
template <class T, class O>
void moments_impl(const Args& a, int64_t begin, int64_t end) {
    using V = typename Lanes<T>::vector;
    using S = typename Lanes<T>::scalar;
    constexpr int L = sizeof(V) / sizeof(V{}[0]);
    const T* y = static_cast<const T*>(a.y);
    O* out = static_cast<O*>(a.out);
    S* mean = static_cast<S*>(a.sums[0]);
    S* m2 = static_cast<S*>(a.sums[1]);
    V buffer[kTile];
    auto fetch = [&](int64_t off, int n) __attribute__((always_inline)) {
        V v = load<V>(y + off, n);
        if (out) {
            store(out + off, v, n);
            v = load<V>(out + off, n);
        }
        return v;
    };
    auto tile = [&](int64_t count) __attribute__((always_inline)) {
        V sum{}, squares{};
        for (int64_t r = 0; r < count; r++) sum = sum + buffer[r];
        const V average = sum * splat<V>(1.0 / count);
        for (int64_t r = 0; r < count; r++) squares = squares + (buffer[r] - average) * (buffer[r] - average);
        return Moments<V, S>{S(count), average, squares};
    };
    if (a.layout.plane) {
        const int64_t size = a.layout.plane;
        for (int64_t b = begin; b < end; b++) {
            Moments<V, S> all{0, V{}, V{}};
            int64_t i = 0;
            while (i + L <= size) {
                int64_t count = 0;
                for (; count < kTile && i + L <= size; count++, i += L) buffer[count] = fetch(b * size + i, L);
                all.merge(tile(count));
            }
            Moments<S, S> plane{0, 0, 0};
            for (int l = 0; l < L; l++) plane.merge({all.count, all.mean[l], all.m2[l]});
            if (i < size) {
                const int n = int(size - i);
                const V tail = fetch(b * size + i, n);
                for (int l = 0; l < n; l++) plane.merge({1, tail[l], 0});
            }
            mean[b] = plane.mean;
            m2[b] = plane.m2;
        }
        return;
    }
    S seen = 0;
    int64_t first = -1;
    tiles<L>(a.layout, begin, end, [&](int64_t c, int n, int64_t off, int64_t rows) __attribute__((always_inline)) {
        if (c == 0) {
            seen = first < 0 ? 0 : seen + S(first);
            first = rows;
        }
        for (int64_t r = 0; r < rows; r++) buffer[r] = fetch(off + r * a.layout.channels, n);
        Moments<V, S> all{seen, seen == 0 ? V{} : load<V>(mean + c, n), seen == 0 ? V{} : load<V>(m2 + c, n)};
        all.merge(tile(rows));
        store(mean + c, all.mean, n);
        store(m2 + c, all.m2, n);
    });
}

// ------------------------------------------------------------------------------------------- from types to templates
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
template <Act A>
struct Fixed {
    FR_INLINE explicit Fixed(Act) {}
    template <class V>
    FR_INLINE V forward(V z, V p) const { return act<A>(z, p); }
    template <class V>
    FR_INLINE V backward(V g, V z, V p) const { return act_backward<A>(g, z, p); }
};
struct Chosen {
    Act chosen;
    FR_INLINE explicit Chosen(Act a) : chosen(a) {}
    template <class F>
    FR_INLINE auto with(F f) const {
        switch (chosen) {
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

template <class F>
FR_INLINE void by_act(Act a, F f) {
    if (a == Act::identity) return f(Tag<Fixed<Act::identity>>{});
    if (a == Act::relu) return f(Tag<Fixed<Act::relu>>{});
    f(Tag<Chosen>{});
}

void bn_act_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, begin, end);
        });
    });
}
void bn_act_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_backward_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, begin, end);
        });
    });
}
void bn_backward_any(const Args& a, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        bn_backward_impl<typename decltype(t)::type, typename decltype(o)::type>(a, begin, end);
    });
}
void moments_any(const Args& a, int64_t begin, int64_t end) {
    if (a.y_type == DType::f32 && a.other_type == DType::bf16) return moments_impl<float, bf16>(a, begin, end);
    if (a.y_type == DType::f32 && a.other_type == DType::f16) return moments_impl<float, _Float16>(a, begin, end);
    if (a.y_type == DType::f64) return moments_impl<double, double>(a, begin, end);
    if (a.y_type == DType::f32) return moments_impl<float, float>(a, begin, end);
    if (a.y_type == DType::bf16) return moments_impl<bf16, bf16>(a, begin, end);
    moments_impl<_Float16, _Float16>(a, begin, end);
}
void bn_act_max_pool_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, q, begin, end);
        });
    });
}
void bn_act_max_pool_backward_any(const Args& a, const Pool& q, int64_t begin, int64_t end) {
    by_types(a.y_type, a.other_type, [&](auto t, auto o) {
        by_act(a.act, [&](auto k) {
            bn_act_max_pool_backward_impl<typename decltype(t)::type, typename decltype(o)::type, typename decltype(k)::type>(a, q, begin, end);
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
                winograd_output_impl<m, typename decltype(t)::type, typename decltype(k)::type>(a, q, product, begin, end);
            });
        });
    });
}
void winograd_weight_any(int tile, const float* weight, float* u, int64_t K, int64_t C, bool flip, int64_t begin,
                         int64_t end) {
    by_tile(tile, [&](auto m) { winograd_weight_impl<m>(weight, u, K, C, flip, begin, end); });
}
void pointwise_any(const Args& a, const Direct& q, int64_t begin, int64_t end) {
    by_act(a.act, [&](auto k) { pointwise_impl<typename decltype(k)::type>(a, q, begin, end); });
}
void stem_any(const Args& a, const Direct& q, const Pool& pool, float* scratch, int64_t begin, int64_t end) {
    by_act(a.act, [&](auto k) { stem_impl<typename decltype(k)::type>(a, q, pool, scratch, begin, end); });
}

}  // namespace
