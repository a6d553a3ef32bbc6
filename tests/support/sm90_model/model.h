// What a kernel needs of CUDA to be compiled by a C++ compiler, and a block of threads as fibers, which take turns in
// an order drawn at random. Collective instructions wait until all threads that take part have come.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH_FEAT_SM90_ALL

using cudaError_t = int;
using cudaStream_t = void*;
struct float2 {
    float x, y;
};
struct Dim {
    int x;
};
using std::min;

namespace model {

constexpr int kMaxThreads = 1024, kStack = 1 << 16;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    bool done = false;
};

// Where threads wait for each other.
struct Meeting {
    int arrived = 0;
    unsigned round = 0;
    template <class Together>
    void meet(int size, Together together);
};

inline struct State {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::map<int, Meeting> barriers;  // by their ids; 0: __syncthreads
    std::vector<std::function<void()>> later;  // what the hardware does in its own time
    ucontext_t scheduler;
    std::function<void()> kernel;
    std::mt19937 random;
    int thread = 0, moved = 0;
} state;

inline void yield() { swapcontext(&state.fibers[state.thread]->context, &state.scheduler); }
template <class Condition>
void wait_for(Condition condition) {
    while (!condition()) yield();
    state.moved = 1;
}

// `size` threads meet; the last one to come runs `together` before any goes on.
template <class Together>
void Meeting::meet(int size, Together together) {
    const unsigned mine = round;
    if (++arrived == size) {
        together();
        arrived = 0, ++round, state.moved = 1;
    } else {
        wait_for([&] { return round != mine; });
    }
}

inline void enter() {
    state.kernel();
    state.fibers[state.thread]->done = true;
    state.moved = 1;
    yield();
}

// Runs something that the hardware was asked for, if there is any: loads complete in any order.
inline void hardware() {
    if (state.later.empty()) return;
    const size_t i = state.random() % state.later.size();
    const auto action = state.later[i];
    state.later.erase(state.later.begin() + static_cast<std::ptrdiff_t>(i));
    action();
    state.moved = 1;
}

// One block. False: its threads wait for each other for ever.
inline bool run_block(int threads, unsigned seed, std::function<void()> kernel) {
    state.fibers.clear(), state.barriers.clear(), state.later.clear();
    state.kernel = std::move(kernel);
    state.random.seed(seed);
    for (int t = 0; t < threads; ++t) {
        state.fibers.push_back(std::make_unique<Fiber>());
        Fiber& f = *state.fibers.back();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, reinterpret_cast<void (*)()>(enter), 0);
    }
    std::vector<int> warps(static_cast<size_t>(threads / 32));
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
    for (int idle = 0; idle < 100;) {
        bool alive = false;
        state.moved = 0;
        std::shuffle(warps.begin(), warps.end(), state.random);
        for (const int warp : warps) {
            if (state.random() % 4 == 0) continue;  // this warp is late
            for (state.thread = warp * 32; state.thread < warp * 32 + 32; ++state.thread) {
                Fiber& f = *state.fibers[state.thread];
                if (f.done) continue;
                alive = true;
                swapcontext(&state.scheduler, &f.context);
            }
            if (state.random() % 4 == 0) hardware();
        }
        const auto done = [](const std::unique_ptr<Fiber>& f) { return f->done; };
        if (!alive && std::all_of(state.fibers.begin(), state.fibers.end(), done)) return true;
        if (state.moved == 0) hardware();
        idle = state.moved ? 0 : idle + 1;
    }
    return false;
}

}  // namespace model

inline struct {
    struct {
        operator int() const { return model::state.thread; }
    } x;
} threadIdx;
inline Dim blockIdx, gridDim;

inline void __trap() { std::abort(); }
inline void __syncthreads() {
    model::state.barriers[0].meet(static_cast<int>(model::state.fibers.size()), [] {});
}
