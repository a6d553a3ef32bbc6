// CUDA for a CPU, as much of it as csrc/cuda/*.cu use: the same sources run where there is no GPU.
//
// The threads of a block are fibers that take turns: each runs until it ends or reaches a barrier, blocks run one after
// another. What a GPU would leave to chance is made visible: shared memory starts as NaN in every block, a barrier that
// only some threads reach ends the program, and with `backwards` threads and blocks run in the opposite order, so that
// a result which depends on the order differs.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define FR_SHARED(S, name) S* const name = reinterpret_cast<S*>(cuda_on_cpu::shared())

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
template <class T>
inline T __ldg(const T* from) {
    return *from;
}

// 16-bit floats, rounded to nearest even.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float to;
    memcpy(&to, &bits, 4);
    return to;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (v != v) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = true;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    ucontext_t scheduler;
    Fiber* current = nullptr;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::unique_ptr<unsigned char[]> shared;
    // what AddressSanitizer is told
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
};
inline Machine machine;
inline bool backwards = false;

inline unsigned char* shared() { return machine.shared.get(); }

// Back to the scheduler, for good where `last`.
inline void leave(bool last) {
    Fiber* me = machine.current;
    (void)last;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, machine.scheduler_stack, machine.scheduler_size);
#endif
    swapcontext(&me->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &machine.scheduler_stack, &machine.scheduler_size);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
    machine.body(machine.argument);
    machine.current->done = true;
    leave(true);
}

inline void resume(Fiber& fiber) {
    machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStack);
#endif
    swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void run_block(unsigned threads) {
    while (machine.fibers.size() < threads) machine.fibers.emplace_back(new Fiber);
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = *machine.fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.done = false;
    }
    for (unsigned waiting = threads; waiting > 0;) {
        const unsigned before = waiting;
        waiting = 0;
        for (unsigned i = 0; i < threads; i++) {
            const unsigned t = backwards ? threads - 1 - i : i;
            threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
            if (machine.fibers[t]->done) continue;
            resume(*machine.fibers[t]);
            waiting += !machine.fibers[t]->done;
        }
        if (waiting != 0 && waiting != before) {
            fprintf(stderr, "cuda_on_cpu: %u of %u threads wait at a barrier, the others have ended\n", waiting,
                    before);
            abort();
        }
    }
}

// `call` once per thread of the grid.
template <class Call>
void launch(dim3 grid, dim3 threads, size_t shared, Call call) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const unsigned count = threads.x * threads.y * threads.z;
    if (count > 1024 || shared > 48 << 10 || grid.y > 65535 || grid.z > 65535) {
        fprintf(stderr,
                "cuda_on_cpu: %u threads, %zu bytes of shared memory, a grid of %u x %u x %u: more than a GPU takes\n",
                count, shared, grid.x, grid.y, grid.z);
        abort();
    }
    gridDim = grid, blockDim = threads;
    machine.body = [](void* argument) { (*static_cast<Call*>(argument))(); };
    machine.argument = &call;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
        machine.shared.reset(new unsigned char[shared]);
        memset(machine.shared.get(), 0xff, shared);
        run_block(count);
    }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
    const dim3 me = threadIdx;
    cuda_on_cpu::leave(false);
    threadIdx = me;
}

namespace fused_resnet::cuda {

template <class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, Stream, const A&... args) {
    cuda_on_cpu::launch(grid, threads, shared, [&] { kernel(args...); });
    return nullptr;
}

// Few, so that a block has many rows.
inline int processors() { return 2; }

}  // namespace fused_resnet::cuda
