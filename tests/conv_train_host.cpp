// csrc/cuda/conv_train_sm90.cu on a CPU: the steps of its kernel with the index functions of conv_train_map.h, on models of
// the hardware written from the PTX manual alone: mbarriers (phases), TMA (boxes, swizzle, what lies outside), ldmatrix,
// stmatrix, wgmma (fragments, descriptor). Producer and consumer groups take turns at random; a stage that is written
// while somebody reads it, or read before it is full, shows in the result, and a wait that never ends is reported.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/cuda/conv_train_map.h"

using namespace fused_resnet;
using namespace fused_resnet::cuda::train;

namespace {

using Half = uint16_t;  // the bits of a 16-bit value

// "The phase of a barrier completes when its pending arrivals and its pending bytes are zero"
struct Barrier {
    int expected, pending, bytes = 0;
    uint32_t phase = 0;
    explicit Barrier(int count) : expected(count), pending(count) {}
    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
    }
    void arrive(int expect = 0) { bytes += expect, --pending, settle(); }
    void complete(int n) { bytes -= n, settle(); }
    // try_wait.parity: true once the phase of that parity is complete
    bool passed(uint32_t parity) const { return (phase & 1) != (parity & 1); }
};

// CU_TENSOR_MAP_SWIZZLE_128B: address bits 4-6 ^= bits 7-9
size_t swizzle(size_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Boxes of `rows` rows of 64 columns of a matrix, to and from shared memory at an address aligned to 1024 bytes.
struct Map {
    Half* at;
    int64_t rows, columns;
    int box;
    int load(char* smem, size_t to, int x, int y) const {
        for (int i = 0; i < box; ++i)
            for (int j = 0; j < 64; ++j) {
                const bool in = y + i >= 0 && y + i < rows && x + j >= 0 && x + j < columns;
                const Half value = in ? at[(y + i) * columns + x + j] : Half{0};
                std::memcpy(smem + swizzle(to + i * 128 + j * 2), &value, 2);
            }
        return box * 128;
    }
    void store(const char* smem, size_t from, int x, int y) const {
        for (int i = 0; i < box; ++i)
            for (int j = 0; j < 64; ++j)
                if (y + i >= 0 && y + i < rows && x + j >= 0 && x + j < columns)
                    std::memcpy(at + (y + i) * columns + x + j, smem + swizzle(from + i * 128 + j * 2), 2);
    }
};

// im2col: `box` pixels from (n, h, w) on, w and h in steps, from `lower` to the image's last pixel + `upper`, w first;
// of each the pixel (down, right) further.
struct ImageMap {
    const Half* at;
    int n, h, w, c, lower_h, lower_w, upper_h, upper_w, step_h, step_w, box;
    int load(char* smem, size_t to, int channel, int x, int y, int image, int right, int down) const {
        for (int i = 0; i < box; ++i) {
            const int row = y + down, column = x + right;
            const bool in = image < n && row >= 0 && row < h && column >= 0 && column < w;
            const Half* from = at + ((int64_t{image} * h + row) * w + column) * c + channel;
            for (int j = 0; j < 64; ++j) {
                const Half value = in && channel + j < c ? from[j] : Half{0};
                std::memcpy(smem + swizzle(to + i * 128 + j * 2), &value, 2);
            }
            if ((x += step_w) <= w - 1 + upper_w) continue;
            x = lower_w;
            if ((y += step_h) <= h - 1 + upper_h) continue;
            y = lower_h;
            ++image;
        }
        return box * 128;
    }
};

// ldmatrix.x4: threads 8 i to 8 i + 7 give the addresses of the rows of matrix i; thread t receives, of matrix i, elements
// 2 (t % 4) and the next of row t / 4, in register i.
void ldmatrix(const char* smem, const size_t (&address)[32], uint32_t (&r)[32][4]) {
    for (int t = 0; t < 32; ++t)
        for (int i = 0; i < 4; ++i) std::memcpy(&r[t][i], smem + address[8 * i + t / 4] + t % 4 * 4, 4);
}
void stmatrix(char* smem, const size_t (&address)[32], const uint32_t (&r)[32][4]) {
    for (int t = 0; t < 32; ++t)
        for (int i = 0; i < 4; ++i) std::memcpy(smem + address[8 * i + t / 4] + t % 4 * 4, &r[t][i], 4);
}

// wgmma m64nNk16, by one warp (i of its group: rows 16 i to 16 i + 15). A: register r of thread t holds row t / 4 + 8 (r % 2),
// columns 2 (t % 4) + 8 (r / 2) and the next. D: register r holds row t / 4 + 8 (r / 2 % 2), column 8 (r / 4) + 2 (t % 4) + r % 2.
// B: N rows of 16 values, 128 bytes apart, at the descriptor's address, which is swizzled as a whole.
template <class T>
void wgmma(std::vector<float>* d, const uint32_t (&a)[32][4], const char* smem, size_t b, int n, bool accumulate) {
    std::vector<float> left(16 * 16), right(n * 16);
    for (int t = 0; t < 32; ++t)
        for (int r = 0; r < 4; ++r) {
            const Float2 v = T::unpack(a[t][r]);
            float* to = &left[(t / 4 + r % 2 * 8) * 16 + t % 4 * 2 + r / 2 * 8];
            to[0] = v.x, to[1] = v.y;
        }
    for (int j = 0; j < n; ++j)
        for (int k = 0; k < 16; k += 2) {
            uint32_t pair;
            std::memcpy(&pair, smem + swizzle(b + j * 128 + k * 2), 4);
            const Float2 v = T::unpack(pair);
            right[j * 16 + k] = v.x, right[j * 16 + k + 1] = v.y;
        }
    for (int t = 0; t < 32; ++t)
        for (int r = 0; r < n / 2; ++r) {
            const float* x = &left[(t / 4 + r / 2 % 2 * 8) * 16];
            const float* y = &right[(r / 4 * 8 + t % 4 * 2 + r % 2) * 16];
            float sum = accumulate ? d[t][r] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
            d[t][r] = sum;
        }
}

enum class Pre { none, identity, relu };

struct Case {
    Window window;
    int n, c, k, pre, blocks;
    Half *x, *w, *y;
    const float *scale, *shift;
    float *mean, *m2;
};

template <int BlockN, class T>
struct Block {
    using S = Smem<BlockN>;
    const Case& g;
    const int block, m;
    const Map x, w, y;
    const ImageMap images;
    const Tiles tiles;
    std::vector<char> memory;
    char* smem;
    std::vector<Barrier> full, empty;

    Block(const Case& g, int block)
        : g(g), block(block), m(g.n * g.window.p * g.window.q), x{g.x, m, g.c, kBlockM},
          w{g.w, g.k, int64_t{g.window.count()} * g.c, BlockN}, y{g.y, m, g.k, kBlockM}, images(image_map(g)), tiles(Tiles::of(m, g.k, BlockN)),
          memory(S::kBytes, '\xff'), smem(memory.data()), full(S::kStages, Barrier(1)),
          empty(S::kStages, Barrier(kConsumers / 32)) {}  // 0xffff is NaN in both types

    static ImageMap image_map(const Case& g) {
        const Window& v = g.window;
        return {g.x, g.n, v.h, v.w, g.c, -v.pad_h, -v.pad_w, v.pad_h - v.dil_h * (v.r - 1), v.pad_w - v.dil_w * (v.s - 1),
                v.stride_h, v.stride_w, kBlockM};
    }
    float* norm(int stage) { return reinterpret_cast<float*>(smem + S::kNormAt + stage * kNormBytes); }

    // The place of a role in its loops over tiles, taps and channels.
    struct Place {
        int tile = 0, tap = 0, c = 0;
        Cursor<S::kStages> at;
        // false when the tile is over
        bool next(const Case& g) {
            at.advance();
            if ((c += kBlockK) < g.c) return true;
            c = 0;
            if (++tap < g.window.count()) return true;
            tap = 0;
            return false;
        }
    };
    Place producer;
    struct Group {
        Place place;
        int previous = -1;
        bool finished = false;  // its products of the tile
        std::vector<float> acc[4][32];
    } groups[kGroups];

    bool produce() {
        Place& p = producer;
        if (p.tile >= tiles.count() || !empty[p.at.stage].passed(p.at.phase ^ 1)) return false;
        Barrier& barrier = full[p.at.stage];
        const size_t stage = p.at.stage * S::kStage;
        const int row = tiles.m(p.tile) * kBlockM, k = tiles.n(p.tile) * BlockN;
        const Window& v = g.window;
        barrier.arrive(S::kStage + (g.pre ? kNormBytes : 0));
        if (v.flat())
            barrier.complete(x.load(smem, stage, p.c, row + v.shift(p.tap)));
        else
            barrier.complete(
                images.load(smem, stage, p.c, v.left(row), v.top(row), v.image(row), v.right(p.tap), v.down(p.tap)));
        barrier.complete(w.load(smem, stage + kSlabBytes, p.tap * g.c + p.c, k));
        if (g.pre) {
            std::copy_n(g.scale + p.c, kBlockK, norm(p.at.stage));
            std::copy_n(g.shift + p.c, kBlockK, norm(p.at.stage) + kBlockK);
            barrier.complete(kNormBytes);
        }
        if (!p.next(g)) p.tile += g.blocks;
        return true;
    }

    template <Pre P>
    void multiply(Group& group, int index) {
        Place& p = group.place;
        const size_t stage = p.at.stage * S::kStage;
        const int first = tiles.m(p.tile) * kBlockM;
        for (int i = 0; i < 4; ++i) {
            const int warp = index * 4 + i;
            for (int j = 0; j < kBlockK / kStepK; ++j) {
                size_t address[32];
                uint32_t a[32][4];
                for (int lane = 0; lane < 32; ++lane)
                    address[lane] = stage + swizzled(warp_row(warp) + matrix_row(lane), 2 * j + matrix_chunk(lane));
                ldmatrix(smem, address, a);
                for (int lane = 0; lane < 32; ++lane)
                    for (int r = 0; r < 4; ++r) {
                        const int row = warp_row(warp) + fragment_row(lane, r);
                        const float* s = norm(p.at.stage) + j * kStepK + fragment_column(lane, r);
                        if constexpr (P != Pre::none)
                            a[lane][r] = normalised<T, P == Pre::relu ? Act::relu : Act::identity>(
                                a[lane][r], {s[0], s[1]}, {s[kBlockK], s[kBlockK + 1]});
                        if (!(g.window.inside(first + row) >> p.tap & 1)) a[lane][r] = 0;
                    }
                wgmma<T>(group.acc[i], a, smem, stage + kSlabBytes + 2 * j * 16, BlockN, group.previous >= 0 || j > 0);
            }
        }
    }

    bool consume(int index) {
        Group& group = groups[index];
        Place& p = group.place;
        if (p.tile >= tiles.count() || group.finished || !full[p.at.stage].passed(p.at.phase)) return false;
        if (group.previous < 0)
            for (auto& warp : group.acc)
                for (auto& lane : warp) lane.assign(BlockN / 2, std::numeric_limits<float>::quiet_NaN());
        if (g.pre == 0) multiply<Pre::none>(group, index);
        if (g.pre == 1) multiply<Pre::identity>(group, index);
        if (g.pre == 2) multiply<Pre::relu>(group, index);
        const int stage = p.at.stage;
        group.finished = !p.next(g);
        const auto release = [&](int s) {
            for (int warp = 0; warp < 4; ++warp) empty[s].arrive();
        };
        if (group.previous >= 0) release(group.previous);
        group.previous = stage;
        if (group.finished) release(stage);
        return true;
    }

    bool finish() {
        if (groups[0].place.tile >= tiles.count() || !groups[0].finished || !groups[1].finished) return false;
        const int tile = groups[0].place.tile, first = tiles.m(tile) * kBlockM, k = tiles.n(tile) * BlockN;
        const int rows = std::min(m - first, kBlockM);
        for (int warp = 0; warp < kConsumers / 32; ++warp)
            for (int part = 0; part < BlockN / 16; ++part) {
                size_t address[32];
                uint32_t r[32][4];
                for (int lane = 0; lane < 32; ++lane) {
                    address[lane] = S::kOutAt + part / 4 * kSlabBytes +
                                    swizzled(warp_row(warp) + matrix_row(lane), part % 4 * 2 + matrix_chunk(lane));
                    const std::vector<float>& d = groups[warp / 4].acc[warp % 4][lane];
                    for (int i = 0; i < 4; ++i)
                        r[lane][i] = T::pack({d[accumulator(part, i)], d[accumulator(part, i) + 1]});
                }
                stmatrix(smem, address, r);
            }
        for (int slab = 0; slab < BlockN / 64; ++slab) y.store(smem, S::kOutAt + slab * kSlabBytes, k + slab * 64, first);
        float* means = reinterpret_cast<float*>(smem + S::kMomentsAt);
        float* m2s = means + kParts * BlockN;
        std::fill_n(means, 2 * kParts * BlockN, std::numeric_limits<float>::quiet_NaN());
        using Stats = Statistics<BlockN>;
        for (int thread = 0; thread < kConsumers; ++thread)
            for (int round = 0; round < Stats::kRounds; ++round) {
                if (!Stats::works(thread, round)) continue;
                const int part = Stats::part(thread, round), column = Stats::column(thread, round);
                const Moments2 v =
                    part_moments<T>(smem + S::kOutAt + column / 64 * kSlabBytes, part, column % 64, rows);
                means[part * BlockN + column] = v.x.mean, means[part * BlockN + column + 1] = v.y.mean;
                m2s[part * BlockN + column] = v.x.m2, m2s[part * BlockN + column + 1] = v.y.m2;
            }
        for (int thread = 0; thread < BlockN && k + thread < g.k; ++thread) {
            const auto all = merged(means, m2s, BlockN, thread, rows);
            g.mean[int64_t{tiles.m(tile)} * g.k + k + thread] = all.mean;
            g.m2[int64_t{tiles.m(tile)} * g.k + k + thread] = all.m2;
        }
        for (Group& group : groups) group.finished = false, group.previous = -1, group.place.tile += g.blocks;
        return true;
    }

    // 0, or 1 when nobody can go on although tiles are left
    int run(unsigned seed) {
        producer.tile = block;
        for (Group& group : groups) group.place.tile = block;
        std::mt19937 random(seed);
        for (int idle = 0; groups[0].place.tile < tiles.count();) {
            const int role = static_cast<int>(random() % 4);
            const bool moved = role == 0 ? produce() : role == 3 ? finish() : consume(role - 1);
            idle = moved ? 0 : idle + 1;
            if (idle > 1000) return 1;
        }
        return producer.tile < tiles.count();
    }
};

template <int BlockN, class T>
int run_blocks(const Case& g, unsigned seed) {
    for (int block = 0; block < g.blocks; ++block)
        if (const int status = Block<BlockN, T>(g, block).run(seed + block)) return status;
    return 0;
}

}  // namespace

// sizes: n c k h w p q r s stride_h stride_w pad_h pad_w dil_h dil_w pre block_n blocks fp16 seed.
// 0: done, 1: a deadlock, 2: no such block_n.
extern "C" int conv_train(const int* sizes, Half* x, Half* w, const float* scale, const float* shift, Half* y, float* mean,
                          float* m2) {
    const int* z = sizes;
    const Window window{z[3], z[4], z[5], z[6], z[7], z[8], z[9], z[10], z[11], z[12], z[13], z[14]};
    const Case g{window, z[0], z[1], z[2], z[15], z[17], x, w, y, scale, shift, mean, m2};
    const unsigned seed = static_cast<unsigned>(z[19]);
    switch (z[16] + z[18]) {
        case 64: return run_blocks<64, BF16>(g, seed);
        case 65: return run_blocks<64, F16>(g, seed);
        case 128: return run_blocks<128, BF16>(g, seed);
        case 256: return run_blocks<256, BF16>(g, seed);
        default: return 2;
    }
}
