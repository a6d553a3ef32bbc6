// The instructions of sm_90a that conv_train_sm90.cu uses, one function each, named as in NVIDIA's PTX manual.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fused_resnet::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// mbarriers

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Returns when the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// A barrier among `threads` threads of the block, a multiple of a warp; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// TMA

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Loads a box of a matrix into shared memory; elements outside are 0. x counts columns, y rows; both may be negative.
__device__ __forceinline__ void tma_load(void* to, const CUtensorMap& map, int x, int y, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
        : "memory");
}
// Iterates over the pixels of a tensor [N, H, W, C] from (n, h, w) on, with the map's steps of w and h and within its
// bounds. For each it loads the pixel that lies (down, right) further, or 0 outside the image.
__device__ __forceinline__ void tma_load_im2col(void* to, const CUtensorMap& map, int c, int w, int h, int n, int right,
                                                int down, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(shared_address(to)),
        "l"(&map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(right)),
        "h"(static_cast<uint16_t>(down))
        : "memory");
}
// Copies `bytes`, a multiple of 16, between addresses aligned to 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// Stores a box of a matrix from shared memory; elements outside are not written.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, int x, int y, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
                 "r"(y), "r"(shared_address(from))
                 : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when TMA has read everything that this thread asked it to store.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Makes ordinary writes to shared memory visible to TMA.
__device__ __forceinline__ void fence_to_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Matrices of 16 x 16 16-bit values

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// wgmma

template <int N>
__device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
// Orders ordinary accesses of registers before those of the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving computations on accumulators before the wait above this call.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// The descriptor of a matrix of N rows of 64 16-bit values with the 128-byte swizzle: its address, the distance of
// groups of eight rows (1024 bytes), both in units of 16 bytes, and the code of the swizzle. 16 values further along
// the rows is + 2.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
    constexpr uint64_t one = 1;  // for swizzled rows the first of the two distances is ignored
    return static_cast<uint64_t>(address >> 4 & 0x3fff) | one << 16 | (one * 1024 >> 4) << 32 | one << 62;
}

#define FR_LIST_32                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FR_LIST_64                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FR_LIST_128                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FR_D8(i)                                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FR_D32 FR_D8(0), FR_D8(8), FR_D8(16), FR_D8(24)
#define FR_D64 FR_D32, FR_D8(32), FR_D8(40), FR_D8(48), FR_D8(56)
#define FR_D128 FR_D64, FR_D8(64), FR_D8(72), FR_D8(80), FR_D8(88), FR_D8(96), FR_D8(104), FR_D8(112), FR_D8(120)
#define FR_WGMMA_OF(n, type, list, a0, a1, a2, a3, b, keep, registers)                                               \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " keep                                                              \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list "}, {" a0 ", " a1 ", " a2 \
                 ", " a3 "}, " b ", p, 1, 1, 0; }"                                                                   \
                 : registers                                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(accumulate))
#define FR_WGMMA(n, half_n, list, a0, a1, a2, a3, b, keep)                                                          \
    template <>                                                                                                     \
    struct Wgmma<n> {                                                                                               \
        template <bool Bf16>                                                                                        \
        static __device__ __forceinline__ void run(float (&d)[half_n], const uint32_t (&a)[4], uint64_t descriptor, \
                                                   int accumulate) {                                                \
            if constexpr (Bf16) FR_WGMMA_OF(n, "bf16", list, a0, a1, a2, a3, b, keep, FR_D##half_n);                \
            else FR_WGMMA_OF(n, "f16", list, a0, a1, a2, a3, b, keep, FR_D##half_n);                                \
        }                                                                                                           \
    };

// d [64, N] = a [64, 16] b [16, N] (+ d): a in registers, b in shared memory, d in N / 2 registers of each thread of
// the warp group. Asynchronous: neither a nor d may be touched before a wait.
template <int N>
struct Wgmma;
FR_WGMMA(64, 32, FR_LIST_32, "%32", "%33", "%34", "%35", "%36", "%37")
FR_WGMMA(128, 64, FR_LIST_64, "%64", "%65", "%66", "%67", "%68", "%69")
FR_WGMMA(256, 128, FR_LIST_128, "%128", "%129", "%130", "%131", "%132", "%133")

#undef FR_WGMMA
#undef FR_WGMMA_OF
#undef FR_D128
#undef FR_D64
#undef FR_D32
#undef FR_D8
#undef FR_LIST_128
#undef FR_LIST_64
#undef FR_LIST_32

}  // namespace fused_resnet::cuda::sm90
