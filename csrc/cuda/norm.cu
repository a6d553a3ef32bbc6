// BatchNorm's passes over [rows, channels]: the closing normalise + add + act, and the backwards.
#include "tile.cuh"

namespace fused_resnet::cuda {

namespace {

// The summand before the activation: none, a tensor, or a tensor with its own norm.
enum class Add : int { none, tensor, normalised };

// Blocks per multiprocessor of a pass and of a reduction, which also keeps sums in registers; fewer with a residual's
// norm.
constexpr int kResident = 6, kReductionResident = 4;
template <class T, Add ADD>
constexpr int fewer(int blocks) {
    return resident<T>(ADD == Add::normalised ? blocks - 1 : blocks);
}

template <class A, int V>
struct Vectors {
    Lanes<A, V> scale, shift;
    __device__ __forceinline__ Vectors(const Affine& norm, int64_t c, int64_t channels)
        : scale(vector<A, V>(norm.scale, c, channels)), shift(vector<A, V>(norm.shift, c, channels)) {}
};

// z = s y + t [+ r, or + s_d r + t_d]. Forward and backward use this one expression, so both see the same sign.
template <Add ADD, class A, int V>
__device__ __forceinline__ Lanes<A, V> closing(const Lanes<A, V>& y, const Lanes<A, V>& r, const Vectors<A, V>& norm,
                                               const Vectors<A, V>& r_norm) {
    const Lanes<A, V> z = affine(y, norm.scale, norm.shift);
    if constexpr (ADD == Add::tensor) return z + r;
    if constexpr (ADD == Add::normalised) return z + affine(r, r_norm.scale, r_norm.shift);
    return z;
}

// out = act(s y + t [+ r, or + s_d r + t_d])
// Tile: tile.cuh. Traffic: y (and r) read once, out written once: 2 (3) elements of T per element, and 8 (16) bytes per
// channel and block. Source: Ioffe and Szegedy 2015 (arXiv 1502.03167), folded to one multiply-add; He et al. 2015.
template <class T, int V, Add ADD>
__global__ void __launch_bounds__(kThreads, fewer<T, ADD>(kResident)) bn_act_kernel(const Pass a, const int64_t each) {
    using A = Wide<T>;
    constexpr int U = unroll_of(V);
    const int64_t c = first_channel<V>();
    if (c >= a.channels) return;
    const Vectors<A, V> norm(a.norm, c, a.channels), r_norm(a.residual_norm, c, a.channels);
    const T* y = static_cast<const T*>(a.y) + c;
    const T* r = static_cast<const T*>(a.residual) + (ADD == Add::none ? 0 : c);
    T* out = static_cast<T*>(a.out) + c;
    Word<T, V> ys[U], rs[U];
    walk<U>(
        a.rows, each,
        [&](int u, int64_t row) {
            ys[u] = fetch<T, V>(y + row * a.channels);
            if constexpr (ADD != Add::none) rs[u] = fetch<T, V>(r + row * a.channels);
        },
        [&](int u, int64_t row) {
            const Lanes<A, V> value = widen<T, V>(ys[u]);
            Lanes<A, V> other = value;
            if constexpr (ADD != Add::none) other = widen<T, V>(rs[u]);
            const Lanes<A, V> z = closing<ADD>(value, other, norm, r_norm);
            store<T, V>(out + row * a.channels, activate(a.act, z, A(a.act_param)));
        });
}

// dz = grad act'(z), z recomputed; per block sum dz, sum dz (y - mu) [, sum dz (r - mu_d)].
// Tile: tile.cuh; sums stay in registers down the rows, then cross the block in shared memory. Traffic: grad, y (and r)
// read once, dz written once: 3 (4) elements of T per element. No atomics: merge_sums adds the blocks' rows in order.
template <class T, int V, Add ADD>
__global__ void __launch_bounds__(kThreads, fewer<T, ADD>(kReductionResident))
    bn_act_backward_kernel(const Pass a, const int64_t each) {
    using A = Wide<T>;
    constexpr int U = unroll_of(V);
    const int64_t c = first_channel<V>();
    Lanes<A, V> total{}, total_y{}, total_r{};
    if (c < a.channels) {
        const Vectors<A, V> norm(a.norm, c, a.channels), r_norm(a.residual_norm, c, a.channels);
        const Lanes<A, V> center = vector<A, V>(a.norm.center, c, a.channels);
        const Lanes<A, V> r_center = vector<A, V>(a.residual_norm.center, c, a.channels);
        const T* grad = static_cast<const T*>(a.grad) + c;
        const T* y = static_cast<const T*>(a.y) + c;
        const T* r = static_cast<const T*>(a.residual) + (ADD == Add::none ? 0 : c);
        T* out = static_cast<T*>(a.out) + c;
        Word<T, V> gs[U], ys[U], rs[U];
        walk<U>(
            a.rows, each,
            [&](int u, int64_t row) {
                gs[u] = fetch<T, V>(grad + row * a.channels);
                ys[u] = fetch<T, V>(y + row * a.channels);
                if constexpr (ADD != Add::none) rs[u] = fetch<T, V>(r + row * a.channels);
            },
            [&](int u, int64_t row) {
                const Lanes<A, V> value = widen<T, V>(ys[u]);
                Lanes<A, V> other = value;
                if constexpr (ADD != Add::none) other = widen<T, V>(rs[u]);
                const Lanes<A, V> z = closing<ADD>(value, other, norm, r_norm);
                const Lanes<A, V> dz = activate_backward(a.act, widen<T, V>(gs[u]), z, A(a.act_param));
                store<T, V>(out + row * a.channels, dz);
                total = total + dz;
                total_y = total_y + dz * (value - center);
                if constexpr (ADD == Add::normalised) total_r = total_r + dz * (other - r_center);
            });
    }
    FR_SHARED(A, shared);
    sum_rows(shared, total, a.partials[0], a.channels);
    sum_rows(shared, total_y, a.partials[1], a.channels);
    if constexpr (ADD == Add::normalised) sum_rows(shared, total_r, a.partials[2], a.channels);
}

// dy = A dz + B (y - mu) + C; with frozen BatchNorm A dz.
// Tile: tile.cuh. Traffic: dz (and y) read once, dy written once: 3 (2) elements of T per element.
template <class T, int V, bool FROZEN>
__global__ void __launch_bounds__(kThreads, resident<T>(kResident - 1))
    bn_backward_kernel(const Pass a, const int64_t each) {
    using A = Wide<T>;
    constexpr int U = unroll_of(V);
    const int64_t c = first_channel<V>();
    if (c >= a.channels) return;
    const Lanes<A, V> scale = vector<A, V>(a.coef[0], c, a.channels), b = vector<A, V>(a.coef[1], c, a.channels);
    const Lanes<A, V> shift = vector<A, V>(a.coef[2], c, a.channels),
                      center = vector<A, V>(a.norm.center, c, a.channels);
    const T* dz = static_cast<const T*>(a.grad) + c;
    const T* y = static_cast<const T*>(a.y) + (FROZEN ? 0 : c);
    T* out = static_cast<T*>(a.out) + c;
    Word<T, V> gs[U], ys[U];
    walk<U>(
        a.rows, each,
        [&](int u, int64_t row) {
            gs[u] = fetch<T, V>(dz + row * a.channels);
            if constexpr (!FROZEN) ys[u] = fetch<T, V>(y + row * a.channels);
        },
        [&](int u, int64_t row) {
            Lanes<A, V> dy = widen<T, V>(gs[u]);
            if constexpr (FROZEN) dy = scale * dy;
            else dy = fused_resnet::bn_backward(dy, widen<T, V>(ys[u]), center, scale, b, shift);
            store<T, V>(out + row * a.channels, dy);
        });
}

Add add_of(const Pass& a) {
    return a.residual == nullptr ? Add::none : a.residual_norm.scale == nullptr ? Add::tensor : Add::normalised;
}

template <class Body>
Status with_add(Add add, Body body) {
    switch (add) {
        case Add::none: return body(std::integral_constant<Add, Add::none>{});
        case Add::tensor: return body(std::integral_constant<Add, Add::tensor>{});
        default: return body(std::integral_constant<Add, Add::normalised>{});
    }
}

int lanes_of(const Pass& a) { return cuda::lanes_of(a.dtype, a.channels, {a.y, a.residual, a.grad, a.out}); }

Tile backward_tile(const Pass& a) { return tile_of(a.rows, a.channels, lanes_of(a), kReductionResident); }

}  // namespace

Split bn_act_backward_split(const Pass& a) { return backward_tile(a).split(); }

Status bn_act(const Pass& a, Stream stream) {
    const int lanes = lanes_of(a);
    const Tile tile = tile_of(a.rows, a.channels, lanes, 2 * kResident);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        return with_add(add_of(a), [&](auto add) {
            using T = typename decltype(type)::type;
            return launch(bn_act_kernel<T, decltype(v)::value, decltype(add)::value>, tile.grid, tile.threads, 0,
                          stream, a, tile.each);
        });
    });
}

Status bn_act_backward(const Pass& a, Stream stream) {
    const int lanes = lanes_of(a);
    const Tile tile = backward_tile(a);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        return with_add(add_of(a), [&](auto add) {
            using T = typename decltype(type)::type;
            return launch(bn_act_backward_kernel<T, decltype(v)::value, decltype(add)::value>, tile.grid, tile.threads,
                          shared_bytes<Wide<T>>(1, lanes), stream, a, tile.each);
        });
    });
}

Status bn_backward(const Pass& a, Stream stream) {
    const int lanes = lanes_of(a);
    const Tile tile = tile_of(a.rows, a.channels, lanes, 2 * kResident);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        using T = typename decltype(type)::type;
        constexpr int V = decltype(v)::value;
        const auto kernel = a.coef[1] == nullptr ? bn_backward_kernel<T, V, true> : bn_backward_kernel<T, V, false>;
        return launch(kernel, tile.grid, tile.threads, 0, stream, a, tile.each);
    });
}

}  // namespace fused_resnet::cuda
