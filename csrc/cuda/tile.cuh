// The split of a pass over [rows, channels]: a thread keeps its channels and iterates over the rows.
//
// A block is TX groups of V channels wide (a power of two, 16 at most: 256 contiguous bytes) and 128/TX rows high. It
// iterates over `each` rows. blockIdx.x counts channel tiles, so that blocks that run side by side share rows.
#pragma once

#include "device.cuh"

namespace fused_resnet::cuda {

constexpr int kWidest = 16;

// The rows that a thread loads before it uses the first. 32 bytes of each operand in flight per thread keep the memory
// of these chips busy with 12 to 24 warps per multiprocessor. Single elements need more rows.
FR_INLINE constexpr int unroll_of(int lanes) { return lanes > 1 ? 2 : 4; }
// The blocks that fit on a multiprocessor with a kernel's registers (of 64 Ki): fewer with f64, which takes two each.
template <class T>
constexpr int resident(int blocks) {
    return sizeof(T) == 8 ? 2 : blocks;
}

struct Tile {
    dim3 grid, threads;
    int64_t each;  // rows per block
    Split split() const { return {int64_t(grid.y), each}; }
};

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks that share a channel tile if there are `across` tiles: `most` per multiprocessor in all, within a grid's
// limits.
inline int64_t blocks_down(int64_t across, int most) {
    const int64_t blocks = int64_t(most) * processors() / (across > 0 ? across : 1);
    return blocks < 1 ? 1 : blocks > 65535 ? 65535 : blocks;
}

// At most `most` blocks per multiprocessor.
inline Tile tile_of(int64_t rows, int64_t channels, int lanes, int most) {
    const int64_t groups = cdiv(channels, lanes);
    unsigned tx = 1;
    while (tx < kWidest && tx < groups) tx *= 2;
    const unsigned ty = kThreads / tx;
    const int64_t across = cdiv(groups, tx), step = int64_t(ty) * unroll_of(lanes), steps = cdiv(rows, step);
    const int64_t each = (steps > 0 ? cdiv(steps, blocks_down(across, most)) : 1) * step;
    return {dim3(unsigned(across), unsigned(cdiv(rows, each))), dim3(tx, ty), each};
}

// This thread's first channel.
template <int V>
__device__ __forceinline__ int64_t first_channel() {
    return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
}

// Calls get(u, row) for up to U rows, then use(u, row) for the same rows: U loads of each operand are in flight at
// once.
template <int U, class Get, class Use>
__device__ __forceinline__ void walk(int64_t rows, int64_t each, Get get, Use use) {
    const int64_t first = blockIdx.y * each, end = rows < first + each ? rows : first + each, step = blockDim.y;
    for (int64_t row = first + threadIdx.y; row < end; row += U * step) {
#pragma unroll
        for (int u = 0; u < U; u++)
            if (row + u * step < end) get(u, row + u * step);
#pragma unroll
        for (int u = 0; u < U; u++)
            if (row + u * step < end) use(u, row + u * step);
    }
}

// The shared memory of `kinds` quantities of a block.
template <class A>
size_t shared_bytes(int kinds, int lanes) {
    return sizeof(A) * kinds * lanes * kThreads;
}

// Writes V values of this thread to the place that `column` reads.
template <class A, int V>
__device__ __forceinline__ void spread(A* shared, const Lanes<A, V>& value) {
#pragma unroll
    for (int i = 0; i < V; i++) shared[(threadIdx.y * V + i) * blockDim.x + threadIdx.x] = value[i];
}

// After a barrier: body(channel, place) in one thread per channel of the block (never more than threads, as V <= 8 and
// TX <= 16); the values of block row y are at shared[place + y * pitch], pitch = V * blockDim.x.
template <int V, class Body>
__device__ __forceinline__ void column(int64_t channels, Body body) {
    static_assert(V * kWidest <= kThreads, "one thread per channel of a block");
    const unsigned t = threadIdx.y * blockDim.x + threadIdx.x;
    const int64_t channel = (int64_t(blockIdx.x) * blockDim.x + t % blockDim.x) * V + t / blockDim.x;
    if (t < V * blockDim.x && channel < channels) body(channel, t);
}

// to[channel] = sum over the block's rows of `value`, in the order of the rows. Every thread of the block calls it.
template <class A, int V>
__device__ __forceinline__ void sum_rows(A* shared, const Lanes<A, V>& value, void* to, int64_t channels) {
    __syncthreads();
    spread(shared, value);
    __syncthreads();
    column<V>(channels, [&](int64_t channel, unsigned place) {
        A total = 0;
        for (unsigned y = 0; y < blockDim.y; y++) total += shared[place + y * V * blockDim.x];
        static_cast<A*>(to)[blockIdx.y * channels + channel] = total;
    });
}

}  // namespace fused_resnet::cuda
