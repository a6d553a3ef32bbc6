// csrc/cuda/sm90_ptx.cuh on a CPU, written from the PTX manual: each function does what its instruction promises, and
// not a moment sooner. Loads come in any order and at any time; wgmma reads its registers and shared memory, and writes
// its accumulators, when somebody waits for it; TMA reads what it stores when somebody waits for that.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "conv_train_map.h"
#include "model.h"

// What a tensor map says of a matrix [rows, columns], or of images [n, h, w, c] to walk over.
struct CUtensorMap {
    uint16_t* at;
    int64_t rows, columns;
    int box;
    int n, h, w, lower_h, lower_w, upper_h, upper_w, step_h, step_w;
};

namespace fused_resnet::cuda::sm90 {

inline char* shared;  // the block's memory, aligned to 1024

inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - shared); }

// "The phase completes when pending arrivals and pending bytes are both zero."
struct Barrier {
    int expected = 0, pending = 0, bytes = 0;
    uint32_t phase = 0;
    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected, model::state.moved = 1;
    }
};
inline std::map<uint64_t*, Barrier> barriers;

inline void barrier_init(uint64_t* b, uint32_t arrivals) {
    barriers[b] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint64_t* b, uint32_t bytes) {
    Barrier& barrier = barriers.at(b);
    barrier.bytes += static_cast<int>(bytes), --barrier.pending, barrier.settle();
}
inline void barrier_arrive(uint64_t* b) { barrier_arrive_expect(b, 0); }
inline void barrier_complete(uint64_t* b, int bytes) { barriers.at(b).bytes -= bytes, barriers.at(b).settle(); }
// Parity names a phase: that one is complete when the current one has the other parity.
inline void barrier_wait(uint64_t* b, uint32_t parity) {
    model::wait_for([=] { return (barriers.at(b).phase & 1) != (parity & 1); });
}
inline void named_barrier(int id, int threads) {
    model::state.barriers[id].meet(threads, [] {});
}

// CU_TENSOR_MAP_SWIZZLE_128B: address bits 4-6 ^= bits 7-9
inline size_t swizzle(size_t address) { return address ^ ((address >> 7 & 7) << 4); }
inline void put(size_t to, const uint16_t* from, bool inside) {
    const uint16_t value = inside ? *from : uint16_t{0};
    std::memcpy(shared + swizzle(to), &value, 2);
}

inline void prefetch(const CUtensorMap&) {}
inline void tma_load(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier) {
    model::state.later.push_back([=, &map] {
        for (int i = 0; i < map.box; ++i)
            for (int j = 0; j < 64; ++j)
                put(shared_address(to) + i * 128 + j * 2, map.at + (y + i) * map.columns + x + j,
                    y + i >= 0 && y + i < map.rows && x + j >= 0 && x + j < map.columns);
        barrier_complete(barrier, map.box * 128);
    });
}
// `box` pixels from (n, h, w) on: w in steps up to the last pixel + upper, then h, then the next image from lower on.
inline void tma_load_im2col(void* to, const CUtensorMap& map, int c, int w, int h, int n, int right, int down,
                            uint64_t* barrier) {
    model::state.later.push_back([=, &map]() mutable {
        for (int i = 0; i < map.box; ++i) {
            const int row = h + down, column = w + right;
            for (int j = 0; j < 64; ++j)
                put(shared_address(to) + i * 128 + j * 2,
                    map.at + ((int64_t{n} * map.h + row) * map.w + column) * map.columns + c + j,
                    n < map.n && row >= 0 && row < map.h && column >= 0 && column < map.w && c + j < map.columns);
            if ((w += map.step_w) <= map.w - 1 + map.upper_w) continue;
            w = map.lower_w;
            if ((h += map.step_h) <= map.h - 1 + map.upper_h) continue;
            h = map.lower_h, ++n;
        }
        barrier_complete(barrier, map.box * 128);
    });
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    model::state.later.push_back([=] {
        std::memcpy(to, from, bytes);
        barrier_complete(barrier, static_cast<int>(bytes));
    });
}
inline std::map<int, std::vector<std::function<void()>>> stores;  // of each thread
inline void tma_store(const CUtensorMap& map, int x, int y, const void* from) {
    stores[model::state.thread].push_back([=, &map] {
        for (int i = 0; i < map.box; ++i)
            for (int j = 0; j < 64; ++j)
                if (y + i >= 0 && y + i < map.rows && x + j >= 0 && x + j < map.columns)
                    std::memcpy(map.at + (y + i) * map.columns + x + j,
                                shared + swizzle(shared_address(from) + i * 128 + j * 2), 2);
    });
}
inline void tma_store_commit() {}
inline void tma_store_wait_read() {
    for (const auto& store : stores[model::state.thread]) store();
    stores[model::state.thread].clear();
}
inline void fence_to_tma() {}

// The threads of a warp that call the same instruction, and what each of them brings.
struct Product {
    std::vector<float*> d = std::vector<float*>(32);
    std::vector<const uint32_t*> a = std::vector<const uint32_t*>(32);
    size_t b;
    int n;
    bool bf16, accumulate;
};
struct Warp {
    model::Meeting meeting;
    uint32_t address[32];
    uint32_t* out[32];
    const uint32_t* in[32];
    Product product;
    std::vector<Product> issued;               // not committed yet
    std::vector<std::vector<Product>> groups;  // committed, not waited for
};
inline std::map<int, Warp> warps;
inline Warp& warp() { return warps[model::state.thread / 32]; }
inline int lane() { return model::state.thread % 32; }

// Threads 8 i to 8 i + 7 give the addresses of the rows of matrix i; thread t holds, of matrix i, elements 2 (t % 4)
// and the next of row t / 4, in register i.
inline void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    Warp& w = warp();
    w.address[lane()] = address, w.out[lane()] = r;
    w.meeting.meet(32, [&] {
        for (int t = 0; t < 32; ++t)
            for (int i = 0; i < 4; ++i) std::memcpy(&w.out[t][i], shared + w.address[8 * i + t / 4] + t % 4 * 4, 4);
    });
}
inline void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
    Warp& w = warp();
    w.address[lane()] = address, w.in[lane()] = r;
    w.meeting.meet(32, [&] {
        for (int t = 0; t < 32; ++t)
            for (int i = 0; i < 4; ++i) std::memcpy(shared + w.address[8 * i + t / 4] + t % 4 * 4, &w.in[t][i], 4);
    });
}

template <int N>
void registers_up() {}
template <int N>
void registers_down() {}
inline void wgmma_fence() {}
template <int N>
void pin(float (&)[N]) {}
inline uint64_t wgmma_descriptor(uint32_t address) { return address >> 4 & 0x3fff; }

// A: register r of thread t holds row t / 4 + 8 (r % 2), columns 2 (t % 4) + 8 (r / 2) and the next. D: register r
// holds row t / 4 + 8 (r / 2 % 2), column 8 (r / 4) + 2 (t % 4) + r % 2. Of the warp group's 64 rows, warp i has 16 i
// to 16 i + 15. B: N rows of 16 values, 128 bytes apart, at the descriptor's address, which is swizzled as a whole.
inline void multiply(const Product& p) {
    const auto unpack = [&](uint32_t pair) { return p.bf16 ? train::BF16::unpack(pair) : train::F16::unpack(pair); };
    float left[16][16];
    std::vector<float> right(p.n * 16);
    for (int t = 0; t < 32; ++t)
        for (int r = 0; r < 4; ++r) {
            const train::Float2 v = unpack(p.a[t][r]);
            float* to = &left[t / 4 + r % 2 * 8][t % 4 * 2 + r / 2 * 8];
            to[0] = v.x, to[1] = v.y;
        }
    for (int j = 0; j < p.n; ++j)
        for (int k = 0; k < 16; k += 2) {
            uint32_t pair;
            std::memcpy(&pair, shared + swizzle(p.b + j * 128 + k * 2), 4);
            const train::Float2 v = unpack(pair);
            right[j * 16 + k] = v.x, right[j * 16 + k + 1] = v.y;
        }
    for (int t = 0; t < 32; ++t)
        for (int r = 0; r < p.n / 2; ++r) {
            const float* x = left[t / 4 + r / 2 % 2 * 8];
            const float* y = &right[(r / 4 * 8 + t % 4 * 2 + r % 2) * 16];
            float sum = p.accumulate ? p.d[t][r] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
            p.d[t][r] = sum;
        }
}

template <int N>
struct Wgmma {
    template <bool Bf16>
    static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t descriptor, int accumulate) {
        Warp& w = warp();
        w.product.d[lane()] = d, w.product.a[lane()] = a;
        w.meeting.meet(32, [&] {
            w.product.b = (descriptor & 0x3fff) << 4, w.product.n = N;
            w.product.bf16 = Bf16, w.product.accumulate = accumulate != 0;
            w.issued.push_back(w.product);
            if (accumulate) return;
            for (float* lane_d : w.product.d) std::fill_n(lane_d, N / 2, std::numeric_limits<float>::quiet_NaN());
        });
    }
};
inline void wgmma_commit() {
    Warp& w = warp();
    w.meeting.meet(32, [&] { w.groups.push_back(std::move(w.issued)), w.issued.clear(); });
}
template <int Pending>
void wgmma_wait() {
    Warp& w = warp();
    w.meeting.meet(32, [&] {
        while (w.groups.size() > Pending) {
            for (const Product& p : w.groups.front()) multiply(p);
            w.groups.erase(w.groups.begin());
        }
    });
}

}  // namespace fused_resnet::cuda::sm90
