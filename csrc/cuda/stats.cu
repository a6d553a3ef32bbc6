// Statistics per channel, the merge of the blocks' partial results, and the vectors computed from them.
#include "tile.cuh"

namespace fused_resnet::cuda {

namespace {

constexpr int kResident = 8;
// The merge has few channels and many rows, so a block is narrow and high.
constexpr int kMergeX = 4, kMergeY = kThreads / kMergeX;

// Rows y, y + pitch, ... below `rows`.
__device__ __forceinline__ unsigned rows_of(unsigned rows, unsigned y, unsigned pitch) {
    return y < rows ? (rows - y - 1) / pitch + 1 : 0;
}

// mean and M2 = sum (y - mean)^2 of a block's rows, by Welford's update within a thread, Chan's merge across threads.
// Tile: tile.cuh. Traffic: y read once; 8 bytes per channel and block written (16 in f64).
// Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, resident<T>(kResident)) bn_stats_kernel(const Pass a, const int64_t each) {
    using A = Wide<T>;
    constexpr int U = unroll_of(V);
    const int64_t c = first_channel<V>();
    Moments<Lanes<A, V>, A> mine{};
    if (c < a.channels) {
        const T* y = static_cast<const T*>(a.y) + c;
        Word<T, V> ys[U];
        walk<U>(
            a.rows, each, [&](int u, int64_t row) { ys[u] = fetch<T, V>(y + row * a.channels); },
            [&](int u, int64_t) { mine.merge({A(1), widen<T, V>(ys[u]), {}}); });
    }
    FR_SHARED(A, means);
    A* const m2s = means + V * kThreads;
    spread(means, mine.mean);
    spread(m2s, mine.m2);
    __syncthreads();
    const int64_t left = a.rows - blockIdx.y * each;
    const unsigned rows = unsigned(left < each ? left : each);
    column<V>(a.channels, [&](int64_t channel, unsigned place) {
        Moments<A, A> all{};
        for (unsigned row = 0; row < blockDim.y; row++) {
            const unsigned at = place + row * V * blockDim.x;
            all.merge({A(rows_of(rows, row, blockDim.y)), means[at], m2s[at]});
        }
        static_cast<A*>(a.partials[0])[blockIdx.y * a.channels + channel] = all.mean;
        static_cast<A*>(a.partials[1])[blockIdx.y * a.channels + channel] = all.m2;
    });
}

// (count, mean, M2) of the union of all pieces; variance = M2 / count.
// Tile: 4 channels, 32 threads each: thread y merges pieces y, y + 32, ..., then the threads merge in order.
// Traffic: 8 bytes read per piece and channel. Source: as above.
template <class A>
__global__ void __launch_bounds__(kThreads)
    merge_moments_kernel(const int64_t channels, const int64_t rows, const Split split, const A* means, const A* m2s,
                         A* mean, A* var) {
    const int64_t c = int64_t(blockIdx.x) * kMergeX + threadIdx.x;
    Moments<A, A> mine{};
    if (c < channels)
        for (int64_t p = threadIdx.y; p < split.partials; p += kMergeY) {
            const int64_t left = rows - p * split.each;
            mine.merge({A(left < split.each ? left : split.each), means[p * channels + c], m2s[p * channels + c]});
        }
    FR_SHARED(A, shared);
    const unsigned t = threadIdx.y * kMergeX + threadIdx.x;
    shared[t] = mine.count, shared[kThreads + t] = mine.mean, shared[2 * kThreads + t] = mine.m2;
    __syncthreads();
    if (threadIdx.y != 0 || c >= channels) return;
    for (unsigned at = t + kMergeX; at < kThreads; at += kMergeX)
        mine.merge({shared[at], shared[kThreads + at], shared[2 * kThreads + at]});
    // without rows both are NaN, as in PyTorch
    mean[c] = mine.count > 0 ? mine.mean : mine.m2 / mine.count;
    var[c] = mine.m2 / mine.count;
}

struct Sums {
    const void* in[3];
    void* out[3];
};

// out = sum over the rows of in, up to three at once (blockIdx.y).
// Tile: as merge_moments. Traffic: 4 bytes read per row and channel of each.
template <class A>
__global__ void __launch_bounds__(kThreads)
    merge_sums_kernel(const int64_t channels, const int64_t partials, const Sums sums) {
    const int64_t c = int64_t(blockIdx.x) * kMergeX + threadIdx.x;
    const A* in = static_cast<const A*>(sums.in[blockIdx.y]);
    A total = 0;
    if (c < channels)
        for (int64_t p = threadIdx.y; p < partials; p += kMergeY) total += in[p * channels + c];
    FR_SHARED(A, shared);
    const unsigned t = threadIdx.y * kMergeX + threadIdx.x;
    shared[t] = total;
    __syncthreads();
    if (threadIdx.y != 0 || c >= channels) return;
    for (unsigned at = t + kMergeX; at < kThreads; at += kMergeX) total += shared[at];
    static_cast<A*>(sums.out[blockIdx.y])[c] = total;
}

struct Vectors {
    const void* in[5];
    void* out[4];
};

template <class A>
__device__ __forceinline__ A at(const void* vector, int64_t c, A absent) {
    return vector == nullptr ? absent : static_cast<const A*>(vector)[c];
}

// scale, shift, center, rstd of z = scale y + shift, from mean, var, gamma, beta and a convolution's bias.
// Tile: a channel per thread. Traffic: at most 36 bytes per channel. Source: bn_math.h.
template <class A>
__global__ void __launch_bounds__(kThreads) bn_fold_kernel(const int64_t channels, const Vectors v, const A eps) {
    const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= channels) return;
    const Fold<A> fold = fused_resnet::bn_fold(at<A>(v.in[0], c, 0), at<A>(v.in[1], c, 0), at<A>(v.in[2], c, 1),
                                               at<A>(v.in[3], c, 0), at<A>(v.in[4], c, 0), eps);
    static_cast<A*>(v.out[0])[c] = fold.scale;
    static_cast<A*>(v.out[1])[c] = fold.shift;
    static_cast<A*>(v.out[2])[c] = fold.center;
    static_cast<A*>(v.out[3])[c] = fold.rstd;
}

// dgamma, B, C of dy = A dz + B (y - mu) + C, from scale, rstd, sum dz, sum dz (y - mu); frozen: dgamma alone.
// Tile: a channel per thread. Traffic: at most 28 bytes per channel. Source: bn_math.h.
template <class A>
__global__ void __launch_bounds__(kThreads)
    bn_coefficients_kernel(const int64_t channels, const Vectors v, const A count) {
    const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= channels) return;
    const Coefficients<A> k = fused_resnet::bn_coefficients(at<A>(v.in[0], c, 0), at<A>(v.in[1], c, 0),
                                                            at<A>(v.in[2], c, 0), at<A>(v.in[3], c, 0), count);
    static_cast<A*>(v.out[0])[c] = k.dgamma;
    if (v.out[1] == nullptr) return;
    static_cast<A*>(v.out[1])[c] = k.b;
    static_cast<A*>(v.out[2])[c] = k.c;
}

int lanes_of(const Pass& a) { return cuda::lanes_of(a.dtype, a.channels, {a.y}); }

Tile stats_tile(const Pass& a) { return tile_of(a.rows, a.channels, lanes_of(a), kResident); }

// The kernels on vectors take float and double.
template <class Body>
Status with_wide(DType dtype, Body body) {
    return dtype == DType::f64 ? body(Type<double>{}) : body(Type<float>{});
}

}  // namespace

Split bn_stats_split(const Pass& a) { return stats_tile(a).split(); }

Status bn_stats(const Pass& a, Stream stream) {
    const int lanes = lanes_of(a);
    const Tile tile = stats_tile(a);
    return with_lanes(a.dtype, lanes, [&](auto type, auto v) {
        using T = typename decltype(type)::type;
        return launch(bn_stats_kernel<T, decltype(v)::value>, tile.grid, tile.threads, shared_bytes<Wide<T>>(2, lanes),
                      stream, a, tile.each);
    });
}

Status merge_moments(DType dtype, int64_t channels, int64_t rows, Split split, const void* means, const void* m2s,
                     void* mean, void* var, Stream stream) {
    return with_wide(dtype, [&](auto type) {
        using A = typename decltype(type)::type;
        return launch(merge_moments_kernel<A>, dim3(unsigned(cdiv(channels, kMergeX))), dim3(kMergeX, kMergeY),
                      3 * kThreads * sizeof(A), stream, channels, rows, split, static_cast<const A*>(means),
                      static_cast<const A*>(m2s), static_cast<A*>(mean), static_cast<A*>(var));
    });
}

Status merge_sums(DType dtype, int64_t channels, int64_t partials, int kinds, void* const in[3], void* const out[3],
                  Stream stream) {
    Sums sums{};
    for (int k = 0; k < kinds; k++) sums.in[k] = in[k], sums.out[k] = out[k];
    return with_wide(dtype, [&](auto type) {
        using A = typename decltype(type)::type;
        return launch(merge_sums_kernel<A>, dim3(unsigned(cdiv(channels, kMergeX)), unsigned(kinds)),
                      dim3(kMergeX, kMergeY), kThreads * sizeof(A), stream, channels, partials, sums);
    });
}

Status bn_fold(DType dtype, int64_t channels, const void* mean, const void* var, const void* gamma, const void* beta,
               const void* conv_bias, double eps, void* const out[4], Stream stream) {
    return with_wide(dtype, [&](auto type) {
        using A = typename decltype(type)::type;
        const Vectors v{{mean, var, gamma, beta, conv_bias}, {out[0], out[1], out[2], out[3]}};
        return launch(bn_fold_kernel<A>, dim3(unsigned(cdiv(channels, kThreads))), dim3(kThreads), 0, stream, channels,
                      v, A(eps));
    });
}

Status bn_coefficients(DType dtype, int64_t channels, const void* scale, const void* rstd, const void* sum_dz,
                       const void* sum_dz_y, int64_t count, void* const out[3], Stream stream) {
    return with_wide(dtype, [&](auto type) {
        using A = typename decltype(type)::type;
        const Vectors v{{scale, rstd, sum_dz, sum_dz_y, nullptr}, {out[0], out[1], out[2], nullptr}};
        return launch(bn_coefficients_kernel<A>, dim3(unsigned(cdiv(channels, kThreads))), dim3(kThreads), 0, stream,
                      channels, v, A(count));
    });
}

}  // namespace fused_resnet::cuda
