// The layouts of conv_train_sm90.cu: tiles, windows, swizzled shared memory, register fragments, stages of the
// pipeline, statistics. Host and device: tests/backends/test_cuda_conv_train.py runs the kernel's source on a CPU.
#pragma once

#include <cstdint>

#include "../bn_math.h"

namespace fused_resnet::cuda::train {

constexpr int kBlockM = 128;  // pixels of a tile: 64 for each consumer warp group
constexpr int kBlockK = 64;   // channels of a step: 128 bytes, one row of the swizzle
constexpr int kStepK = 16;    // of one wgmma
constexpr int kGroups = 2;    // consumer warp groups
constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + 128;
constexpr int kRowBytes = kBlockK * 2, kSlabBytes = kBlockM * kRowBytes;
constexpr int kNormBytes = 2 * kBlockK * 4;  // scale and shift of a step
constexpr int kParts = 4;                    // of a tile's rows, in the statistics
constexpr int kPartRows = kBlockM / kParts;
constexpr int kMaxTaps = 32;  // bits of a row's mask

// Shared memory. Every part is aligned to 1024 bytes, except the last three:
//     stages x [A: 128 rows of 64 channels | B: BlockN rows of 64 channels]   as TMA writes them, 128-byte swizzle
//     BlockN / 64 slabs of y: 128 rows of 64 channels                         as TMA reads them, 128-byte swizzle
//     stages x [scale | shift], parts x [mean | M2] of BlockN columns, barriers
template <int BlockN>
struct Smem {
    static constexpr int kB = BlockN * kRowBytes, kStage = kSlabBytes + kB, kOut = BlockN / 64 * kSlabBytes;
    static constexpr int kMoments = kParts * 2 * BlockN * 4, kLimit = 227 * 1024;
    static constexpr int kFit = (kLimit - kOut - kMoments - 256) / (kStage + kNormBytes);
    static constexpr int kStages = kFit < 8 ? kFit : 8;
    static constexpr int kOutAt = kStages * kStage, kNormAt = kOutAt + kOut;
    static constexpr int kMomentsAt = kNormAt + kStages * kNormBytes, kBarriersAt = kMomentsAt + kMoments;
    static constexpr int kBytes = kBarriersAt + 2 * kStages * 8;
    static_assert(kBytes <= kLimit && kStages >= 3);
};

// Offset of 16-byte chunk `chunk` of row `row`: bits 4-6 of an address are XORed with bits 7-9.
FR_INLINE int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// ldmatrix.x4 and stmatrix.x4 move a 16x16 block. Registers have the order of wgmma's fragments if lane l points at row
// l % 16, 16-byte chunk l / 16. Register r then holds row lane / 4 + 8 (r % 2), columns 2 (lane % 4) + 8 (r / 2) +
// {0, 1}.
FR_INLINE int matrix_row(int lane) { return lane & 15; }
FR_INLINE int matrix_chunk(int lane) { return lane >> 4; }
FR_INLINE int fragment_row(int lane, int reg) { return (lane >> 2) + 8 * (reg & 1); }
FR_INLINE int fragment_column(int lane, int reg) { return 2 * (lane & 3) + 8 * (reg >> 1); }
// The first of the two accumulators in register r of the 16-column block `block` of y.
FR_INLINE int accumulator(int block, int reg) { return 8 * block + 4 * (reg >> 1) + 2 * (reg & 1); }
// The first row, in the tile, of the 16 rows of a consumer warp (0 to 7 over both groups): wgmma gives warp i of a
// group rows 16 i to 16 i + 15 of its 64.
FR_INLINE int warp_row(int warp) { return 16 * warp; }

// y [N*P*Q, K] in tiles. The channels' tiles of the same pixels are neighbours, so all but one read x from L2.
struct Tiles {
    int count_m, count_n, block_n;
    static FR_INLINE Tiles of(int m, int k, int block_n) {
        return {(m + kBlockM - 1) / kBlockM, (k + block_n - 1) / block_n, block_n};
    }
    FR_INLINE int count() const { return count_m * count_n; }
    FR_INLINE int m(int tile) const { return tile / count_n; }
    FR_INLINE int n(int tile) const { return tile % count_n; }
};

// The pixels of x that a pixel m of y depends on: image(m), row top(m) + down(tap), column left(m) + right(tap).
struct Window {
    int h, w, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
    FR_INLINE int count() const { return r * s; }
    FR_INLINE int image(int m) const { return m / (p * q); }
    FR_INLINE int top(int m) const { return m / q % p * stride_h - pad_h; }
    FR_INLINE int left(int m) const { return m % q * stride_w - pad_w; }
    FR_INLINE int down(int tap) const { return tap / s * dil_h; }
    FR_INLINE int right(int tap) const { return tap % s * dil_w; }
    // If y is as large as x, a tap is x moved by a constant number of pixels: pixel m + shift(tap), if inside.
    FR_INLINE bool flat() const { return stride_h == 1 && stride_w == 1 && p == h && q == w; }
    FR_INLINE int shift(int tap) const { return (down(tap) - pad_h) * w + right(tap) - pad_w; }
    // Bit `tap` is set if that pixel lies in the image.
    FR_INLINE uint32_t inside(int m) const {
        uint32_t mask = 0;
        for (int tap = 0; tap < count(); ++tap) {
            const int i = top(m) + down(tap), j = left(m) + right(tap);
            mask |= static_cast<uint32_t>(i >= 0 && i < h && j >= 0 && j < w) << tap;
        }
        return mask;
    }
};

// A position in the ring of stages. Consumers wait for the phase of parity `phase` of a full barrier. The producer
// waits for the other parity of an empty barrier: with fresh barriers its first round does not wait.
template <int Stages>
struct Cursor {
    int stage = 0;
    uint32_t phase = 0;
    FR_INLINE void advance() {
        if (++stage == Stages) stage = 0, phase ^= 1;
    }
};

// Two neighbouring 16-bit values in a register.
struct Float2 {
    float x, y;
};
struct BF16 {
    static FR_INLINE float bits(uint32_t u) {
        union {
            uint32_t u;
            float f;
        } b{u};
        return b.f;
    }
    static FR_INLINE Float2 unpack(uint32_t pair) { return {bits(pair << 16), bits(pair & 0xffff0000u)}; }
    static FR_INLINE uint32_t pack(Float2 v) {
#ifdef __CUDA_ARCH__
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
        return pair;
#else
        const auto narrow = [](float f) -> uint32_t {
            union {
                float f;
                uint32_t u;
            } b{f};
            return f != f ? 0x7fffu : (b.u + 0x7fffu + (b.u >> 16 & 1)) >> 16;
        };
        return narrow(v.x) | narrow(v.y) << 16;
#endif
    }
};
struct F16 {
#ifdef __CUDA_ARCH__
    static FR_INLINE Float2 unpack(uint32_t pair) {
        Float2 v;
        asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
            : "=f"(v.x), "=f"(v.y)
            : "r"(pair));
        return v;
    }
    static FR_INLINE uint32_t pack(Float2 v) {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
        return pair;
    }
#elif !defined(__CUDACC__)
    union Halves {
        uint32_t pair;
        _Float16 half[2];
    };
    static FR_INLINE Float2 unpack(uint32_t pair) {
        const Halves h{pair};
        return {static_cast<float>(h.half[0]), static_cast<float>(h.half[1])};
    }
    static FR_INLINE uint32_t pack(Float2 v) {
        Halves h;
        h.half[0] = static_cast<_Float16>(v.x), h.half[1] = static_cast<_Float16>(v.y);
        return h.pair;
    }
#else  // nvcc's host pass calls neither
    static Float2 unpack(uint32_t);
    static uint32_t pack(Float2);
#endif
};

// act(scale x + shift) of two neighbouring channels, rounded as x is.
template <class T, Act A>
FR_INLINE uint32_t normalised(uint32_t pair, Float2 scale, Float2 shift) {
    const Float2 x = T::unpack(pair);
    return T::pack({act<A>(affine(x.x, scale.x, shift.x), 0.0f), act<A>(affine(x.y, scale.y, shift.y), 0.0f)});
}

// Statistics of y as it is stored, for part `part` of a tile's rows and two neighbouring columns: the mean, then M2
// about it. `slab` is the columns' slab of y in shared memory; `rows` is the number of the tile's rows that exist.
struct Moments2 {
    Moments<float, float> x, y;
};
FR_INLINE int part_rows(int part, int rows) {
    const int left = rows - part * kPartRows;
    return left < 0 ? 0 : (left < kPartRows ? left : kPartRows);
}
template <class T>
FR_INLINE Moments2 part_moments(const char* slab, int part, int column, int rows) {
    const int first = part * kPartRows, count = part_rows(part, rows);
    const auto at = [&](int row) {
        const int offset = swizzled(row, column / 8) + column % 8 * 2;
        return T::unpack(*reinterpret_cast<const uint32_t*>(slab + offset));
    };
    float x = 0, y = 0;
    for (int i = 0; i < count; ++i) {
        const Float2 v = at(first + i);
        x += v.x, y += v.y;
    }
    const float n = static_cast<float>(count), inverse = count ? 1.0f / n : 0.0f;
    Moments2 m{{n, x * inverse, 0.0f}, {n, y * inverse, 0.0f}};
    for (int i = 0; i < count; ++i) {
        const Float2 v = at(first + i);
        const float dx = v.x - m.x.mean, dy = v.y - m.y.mean;
        m.x.m2 += dx * dx, m.y.m2 += dy * dy;
    }
    return m;
}
// The part and the column (within BlockN) of consumer `thread` in round `round` of BlockN / 128 (at least 1): a warp
// reads 64 neighbouring columns of a row, 128 bytes, without a bank conflict.
template <int BlockN>
struct Statistics {
    static constexpr int kPairs = kParts * BlockN / 2, kRounds = (kPairs + kConsumers - 1) / kConsumers;
    static FR_INLINE bool works(int thread, int round) { return round * kConsumers + thread < kPairs; }
    static FR_INLINE int part(int thread, int round) { return (round * kConsumers + thread) / (BlockN / 2); }
    static FR_INLINE int column(int thread, int round) { return (round * kConsumers + thread) % (BlockN / 2) * 2; }
};
// The moments of a column over all rows of the tile. mean, m2: [parts, BlockN].
FR_INLINE Moments<float, float> merged(const float* mean, const float* m2, int block_n, int column, int rows) {
    Moments<float, float> all{0, 0, 0};
    for (int part = 0; part < kParts; ++part) {
        const float count = static_cast<float>(part_rows(part, rows));
        all.merge({count, mean[part * block_n + column], m2[part * block_n + column]});
    }
    return all;
}

}  // namespace fused_resnet::cuda::train
