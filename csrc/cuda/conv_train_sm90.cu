// y[m, k] = sum over (r, s, c) of a[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[k, r, s, c]
// a = act(scale[c] * x + shift[c]), or x; outside of the image a is 0.   m = (n, p, q)
// mean[t, k], M2[t, k] of y over the 128 pixels of tile t.
//
// If y is as large as x (1x1, and 3x3 with stride 1), the tap (r, s) of all pixels is x moved by a constant number of
// rows of its matrix [N*H*W, C], and plain TMA loads it. Otherwise TMA's im2col iterates over the pixels. In both cases
// a mask zeroes pixels outside the image AFTER the prologue, because act(shift) is not 0.
//
// Tile: 128 pixels by 64, 128 or 256 channels, 64 channels of the sum per step. There is one block of threads per
// processor, which takes tile after tile. It has three warp groups. One thread of the producer asks TMA for x, w, scale
// and shift, as many stages ahead as fit into shared memory. Two consumers take 64 of the pixels each: ldmatrix,
// prologue in registers, wgmma with A in registers and B in shared memory. Four wgmma of 16 channels are in flight at
// any time, one group per slice, so that the prologue of a slice runs while the three slices before it multiply.
// Epilogue: y is written in 16 bits to shared memory. TMA stores it from there, and the statistics are computed from
// there in two passes: the mean, then M2 about it, in four parts of 32 rows that are merged by Chan's formula in a
// fixed order.
//
// full[stage]: 1 arrival (the producer's, which also announces the bytes). TMA completes it.
// empty[stage]: 8 arrivals, one per consumer warp, when its wgmma of the stage are done.
// Named barrier 1, for the 256 consumers: staging is free | y is staged | parts of the statistics are written.
//
// Traffic: x once (R*S times from L2), w from L2, y once, 8 bytes per channel and 128 pixels of statistics.
// Source: the warp-specialised persistent GEMM of CUTLASS 3.x, its coordinates of im2col; Chan, Golub, LeVeque 1979.
//
// This is not CUTLASS's own prologue (2.x, fprop with scale, bias and relu). That one computes in float16 with float16
// coefficients, so its error exceeds twice plain float16's if |mean| is a few deviations. It reads bfloat16's bits as
// float16's, and it marks padding by a NaN.
//
// This kernel has never run on a GPU, and no backend lists it. Two things are known. It compiles to the expected
// instructions (tests/backends/test_cuda_conv_codegen.py). Its source computes the right result on a model of these
// instructions in which each takes effect as late as it may (tests/backends/test_cuda_conv_train.py). To be measured
// first: y and statistics against the reference under compute-sanitizer (memcheck, racecheck, synccheck), im2col with
// stride 2 in particular. Then its time against the Triton kernel and cuDNN on ResNet-50's layers, per BLOCK_N. Then
// whether the two consumers should take a tile each (one's epilogue during the other's products), and a cluster that
// shares w by multicast.
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "conv.h"
#include "conv_train_map.h"
#include "sm90_ptx.cuh"

namespace fused_resnet::cuda {
namespace {

using namespace train;

enum class Pre { none, identity, relu };  // x as it is, or act of the prologue

struct Args {
    Window window;
    int m, c, k;                 // pixels of y, channels of x and y
    const float *scale, *shift;  // [C]
    float *mean, *m2;            // [tiles of m, K]
};

template <Pre P, class T>
__device__ __forceinline__ void prologue(uint32_t (&a)[4], const float* norm, int lane, bool inside0, bool inside1) {
    if constexpr (P != Pre::none) {
        constexpr Act A = P == Pre::relu ? Act::relu : Act::identity;
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // columns 0-7 and 8-15: registers 0, 1 and 2, 3
            const int column = fragment_column(lane, 2 * half);
            const float2 scale = *reinterpret_cast<const float2*>(norm + column);
            const float2 shift = *reinterpret_cast<const float2*>(norm + kBlockK + column);
#pragma unroll
            for (int r = 2 * half; r < 2 * half + 2; ++r)
                a[r] = normalised<T, A>(a[r], {scale.x, scale.y}, {shift.x, shift.y});
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = (r & 1 ? inside1 : inside0) ? a[r] : 0u;
}

// One thread of the producer: every step of every tile of this block.
template <class S, int BlockN, Pre P>
__device__ __forceinline__ void produce(const Args& args, const CUtensorMap& x, const CUtensorMap& w, char* smem,
                                        uint64_t* full, uint64_t* empty) {
    const Window& window = args.window;
    const Tiles tiles = Tiles::of(args.m, args.k, BlockN);
    Cursor<S::kStages> at;
    for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        const int row = tiles.m(tile) * kBlockM, k = tiles.n(tile) * BlockN;
        for (int tap = 0; tap < window.count(); ++tap) {
            for (int c = 0; c < args.c; c += kBlockK, at.advance()) {
                char* stage = smem + at.stage * S::kStage;
                float* norm = reinterpret_cast<float*>(smem + S::kNormAt + at.stage * kNormBytes);
                sm90::barrier_wait(empty + at.stage, at.phase ^ 1);
                sm90::barrier_arrive_expect(full + at.stage, S::kStage + (P == Pre::none ? 0 : kNormBytes));
                if (window.flat()) sm90::tma_load(stage, x, c, row + window.shift(tap), full + at.stage);
                else
                    sm90::tma_load_im2col(stage, x, c, window.left(row), window.top(row), window.image(row),
                                          window.right(tap), window.down(tap), full + at.stage);
                sm90::tma_load(stage + kSlabBytes, w, tap * args.c + c, k, full + at.stage);
                if constexpr (P != Pre::none) {
                    sm90::bulk_load(norm, args.scale + c, kNormBytes / 2, full + at.stage);
                    sm90::bulk_load(norm + kBlockK, args.shift + c, kNormBytes / 2, full + at.stage);
                }
            }
        }
    }
}

template <class S, int BlockN, Pre P, class T>
__device__ __forceinline__ void consume(const Args& args, const CUtensorMap& y, char* smem, uint64_t* full,
                                        uint64_t* empty) {
    constexpr int kBarrierId = 1;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32;
    const Tiles tiles = Tiles::of(args.m, args.k, BlockN);
    const int matrix = warp_row(warp) + matrix_row(lane);  // this lane's row for ldmatrix and stmatrix
    char* out = smem + S::kOutAt;
    float* means = reinterpret_cast<float*>(smem + S::kMomentsAt);
    float* m2s = means + kParts * BlockN;
    Cursor<S::kStages> at;
    for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        const int first = tiles.m(tile) * kBlockM, rows = min(args.m - first, kBlockM), k = tiles.n(tile) * BlockN;
        const uint32_t inside0 = args.window.inside(first + warp_row(warp) + fragment_row(lane, 0));
        const uint32_t inside1 = args.window.inside(first + warp_row(warp) + fragment_row(lane, 1));

        float acc[BlockN / 2];
        uint32_t a[kBlockK / kStepK][4];
        int previous = -1;
        for (int tap = 0; tap < args.window.count(); ++tap) {
            for (int c = 0; c < args.c; c += kBlockK, at.advance()) {
                const char* stage = smem + at.stage * S::kStage;
                const float* norm = reinterpret_cast<const float*>(smem + S::kNormAt + at.stage * kNormBytes);
                const uint32_t a_at = sm90::shared_address(stage);
                const uint64_t b = sm90::wgmma_descriptor(a_at + kSlabBytes);
                sm90::barrier_wait(full + at.stage, at.phase);
#pragma unroll
                for (int j = 0; j < kBlockK / kStepK; ++j) {
                    // the products of slice j of the step before are done: its registers are free
                    sm90::wgmma_wait<kBlockK / kStepK - 1>();
                    sm90::ldmatrix(a[j], a_at + swizzled(matrix, 2 * j + matrix_chunk(lane)));
                    prologue<P, T>(a[j], norm + j * kStepK, lane, inside0 >> tap & 1, inside1 >> tap & 1);
                    sm90::wgmma_fence();
                    const bool accumulate = previous >= 0 || j > 0;
                    sm90::Wgmma<BlockN>::template run<std::is_same_v<T, BF16>>(acc, a[j], b + 2 * j, accumulate);
                    sm90::wgmma_commit();
                }
                // the last wait has completed all products of the step before
                if (previous >= 0 && lane == 0) sm90::barrier_arrive(empty + previous);
                previous = at.stage;
            }
        }
        sm90::wgmma_wait<0>();
        sm90::pin(acc);
        if (lane == 0) sm90::barrier_arrive(empty + previous);

        if (thread == 0) sm90::tma_store_wait_read();
        sm90::named_barrier(kBarrierId, kConsumers);
#pragma unroll
        for (int block = 0; block < BlockN / 16; ++block) {
            uint32_t r[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) r[i] = T::pack({acc[accumulator(block, i)], acc[accumulator(block, i) + 1]});
            const uint32_t slab = sm90::shared_address(out + block / 4 * kSlabBytes);
            sm90::stmatrix(slab + swizzled(matrix, block % 4 * 2 + matrix_chunk(lane)), r);
        }
        sm90::fence_to_tma();
        sm90::named_barrier(kBarrierId, kConsumers);
        if (thread == 0) {
#pragma unroll
            for (int slab = 0; slab < BlockN / 64; ++slab)
                sm90::tma_store(y, k + slab * 64, first, out + slab * kSlabBytes);
            sm90::tma_store_commit();
        }
        using Stats = Statistics<BlockN>;
#pragma unroll
        for (int round = 0; round < Stats::kRounds; ++round) {
            if (!Stats::works(thread, round)) continue;
            const int part = Stats::part(thread, round), column = Stats::column(thread, round);
            const Moments2 m = part_moments<T>(out + column / 64 * kSlabBytes, part, column % 64, rows);
            *reinterpret_cast<float2*>(means + part * BlockN + column) = {m.x.mean, m.y.mean};
            *reinterpret_cast<float2*>(m2s + part * BlockN + column) = {m.x.m2, m.y.m2};
        }
        sm90::named_barrier(kBarrierId, kConsumers);
        if (thread < BlockN && k + thread < args.k) {
            const auto all = merged(means, m2s, BlockN, thread, rows);
            const int64_t to = int64_t{tiles.m(tile)} * args.k + k + thread;
            args.mean[to] = all.mean;
            args.m2[to] = all.m2;
        }
    }
}

template <int BlockN, Pre P, class T>
__global__ void __launch_bounds__(kThreads, 1)
    conv_train_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                      const __grid_constant__ CUtensorMap y, const Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using S = Smem<BlockN>;
    extern __shared__ __align__(1024) char smem[];
    if (sm90::shared_address(smem) % 1024 != 0) __trap();  // the swizzle requires it
    uint64_t* full = reinterpret_cast<uint64_t*>(smem + S::kBarriersAt);
    uint64_t* empty = full + S::kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::kStages; ++i) {
            sm90::barrier_init(full + i, 1);
            sm90::barrier_init(empty + i, kConsumers / 32);
        }
        sm90::barrier_init_fence();
        sm90::prefetch(x), sm90::prefetch(w), sm90::prefetch(y);
    }
    __syncthreads();
    // 128 (40 + 2 * 232) of the 65536 registers
    if (threadIdx.x >= kConsumers) {
        sm90::registers_down<40>();
        if (threadIdx.x == kConsumers) produce<S, BlockN, P>(args, x, w, smem, full, empty);
    } else {
        sm90::registers_up<232>();
        consume<S, BlockN, P, T>(args, y, smem, full, empty);
        if (threadIdx.x == 0) sm90::tma_store_wait_read();
    }
#endif
}

// A function of the driver, obtained through the runtime, so that nothing links to the driver's library.
template <class Function>
Function driver(const char* name) {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion(name, &f, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint(name, &f, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Function>(result == cudaDriverEntryPointSuccess ? f : nullptr);
}

// The tensor maps: 16-bit values in boxes of 64 columns, with the 128-byte swizzle.
constexpr auto kInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
constexpr auto kOutside = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;  // zeros

CUtensorMapDataType data_type(ConvType type) {
    return type == ConvType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// [rows, columns], boxes of `box` rows.
bool matrix_map(CUtensorMap* map, ConvType type, const void* at, int64_t rows, int64_t columns, int box) {
    static const auto encode = driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t boxes[] = {kBlockK, static_cast<cuuint32_t>(box)}, steps[] = {1, 1};
    if (encode == nullptr) return false;
    return encode(map, data_type(type), 2, const_cast<void*>(at), sizes, strides, boxes, steps, kInterleave, kSwizzle,
                  kPromotion, kOutside) == CUDA_SUCCESS;
}

// [N, H, W, C], boxes of kBlockM pixels. Pixels begin at -pad and end with the last window.
bool image_map(CUtensorMap* map, const ConvProblem& g, const void* at) {
    static const auto encode = driver<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
    const auto wide = [](int v) { return static_cast<cuuint64_t>(v); };
    const cuuint64_t sizes[] = {wide(g.c), wide(g.w), wide(g.h), wide(g.n)};
    const cuuint64_t row = wide(g.c) * 2, line = row * wide(g.w), strides[] = {row, line, line * wide(g.h)};
    const int lower[] = {-g.pad_w, -g.pad_h};
    const int upper[] = {g.pad_w - g.dil_w * (g.s - 1), g.pad_h - g.dil_h * (g.r - 1)};
    const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(g.stride_w), static_cast<cuuint32_t>(g.stride_h), 1};
    if (encode == nullptr) return false;
    return encode(map, data_type(g.type), 4, const_cast<void*>(at), sizes, strides, lower, upper, kBlockK, kBlockM,
                  steps, kInterleave, kSwizzle, kPromotion, kOutside) == CUDA_SUCCESS;
}

template <int BlockN, Pre P, class T>
cudaError_t launch(const ConvProblem& g, const ConvTrain& t, const Args& args, cudaStream_t stream) {
    CUtensorMap x, w, y;
    const bool have_x = args.window.flat() ? matrix_map(&x, g.type, t.x, args.m, g.c, kBlockM) : image_map(&x, g, t.x);
    if (!have_x || !matrix_map(&w, g.type, t.w, g.k, int64_t{g.r} * g.s * g.c, BlockN) ||
        !matrix_map(&y, g.type, t.y, args.m, g.k, kBlockM))
        return cudaErrorInvalidValue;
    const auto kernel = conv_train_kernel<BlockN, P, T>;
    int device = 0, processors = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Smem<BlockN>::kBytes);
    if (status != cudaSuccess) return status;
    const int tiles = Tiles::of(args.m, g.k, BlockN).count();
    const int blocks = tiles < processors ? tiles : processors;
    kernel<<<blocks, kThreads, Smem<BlockN>::kBytes, stream>>>(x, w, y, args);
    return cudaGetLastError();
}

template <int BlockN, class T>
cudaError_t launch_pre(const ConvProblem& g, const ConvTrain& t, const Args& args, cudaStream_t stream) {
    if (t.scale == nullptr) return launch<BlockN, Pre::none, T>(g, t, args, stream);
    if (t.act == Act::relu) return launch<BlockN, Pre::relu, T>(g, t, args, stream);
    return launch<BlockN, Pre::identity, T>(g, t, args, stream);
}

template <class T>
cudaError_t launch_tile(const ConvProblem& g, const ConvTrain& t, const Args& args, cudaStream_t stream) {
    if (g.k % 256 == 0) return launch_pre<256, T>(g, t, args, stream);
    if (g.k > 64) return launch_pre<128, T>(g, t, args, stream);
    return launch_pre<64, T>(g, t, args, stream);
}

}  // namespace

int conv_train_sm90_rows() { return kBlockM; }

const char* conv_train_sm90_why_not(const ConvProblem& g, Act act) {
    if (g.type == ConvType::tf32) return "the sm_90 training convolution takes bfloat16 and float16, not float32";
    const auto far = [](int reach, int pad) { return reach > 127 || pad > 127; };
    if (g.stride_h > 8 || g.stride_w > 8 || far(g.dil_h * (g.r - 1), g.pad_h) || far(g.dil_w * (g.s - 1), g.pad_w))
        return "the sm_90 training convolution takes strides of at most 8, paddings and kernels of at most 127 pixels";
    if (g.r * g.s > kMaxTaps) return "the sm_90 training convolution takes kernels of at most 32 taps";
    if (g.c % kBlockK != 0) return "the sm_90 training convolution takes input channels that are a multiple of 64";
    if (g.k % 8 != 0) return "the sm_90 training convolution takes output channels that are a multiple of 8";
    if (act != Act::identity && act != Act::relu)
        return "the sm_90 training convolution's prologue takes the activations identity and relu";
    // TMA's coordinates have 32 bits, and a tile may begin a few rows before or after x
    const int64_t limit = int64_t{1} << 30;
    if (g.c < 1 || g.k < 1) return "the sm_90 training convolution takes at least one channel";
    if (g.n < 1 || g.p() < 1 || g.q() < 1 || g.pixels() > limit || int64_t{g.n} * g.h * g.w > limit)
        return "the sm_90 training convolution takes 1 to 2^30 pixels";
    return nullptr;
}

cudaError_t conv_train_sm90(const ConvProblem& g, const ConvTrain& t, cudaStream_t stream) {
    if (conv_train_sm90_why_not(g, t.act) != nullptr) return cudaErrorNotSupported;
    const Args args{{g.h, g.w, g.p(), g.q(), g.r, g.s, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dil_h, g.dil_w},
                    static_cast<int>(g.pixels()),
                    g.c,
                    g.k,
                    t.scale,
                    t.shift,
                    t.mean,
                    t.m2};
    return g.type == ConvType::bf16 ? launch_tile<BF16>(g, t, args, stream) : launch_tile<F16>(g, t, args, stream);
}

}  // namespace fused_resnet::cuda
