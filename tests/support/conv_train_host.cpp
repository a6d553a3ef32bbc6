// The kernel of csrc/cuda/conv_train_sm90.cu on a CPU: its very source, included by
// tests/backends/test_cuda_conv_train.py up to what launches it (kernel.cu), on the model of the instructions in
// tests/support/sm90_model.
#include "kernel.cu"

namespace fused_resnet::cuda {
namespace {

alignas(1024) char smem[Smem<64>::kLimit];

struct Case {
    Args args;
    CUtensorMap x, w, y;
    int blocks, pre;
    unsigned seed;
};

template <int BlockN, class T>
int run(const Case& g) {
    for (int block = 0; block < g.blocks; ++block) {
        std::fill_n(smem, sizeof smem, '\xff');  // NaN in both types
        sm90::shared = smem;
        sm90::barriers.clear(), sm90::warps.clear(), sm90::stores.clear();
        blockIdx.x = block, gridDim.x = g.blocks;
        const auto kernel = g.pre == 0   ? conv_train_kernel<BlockN, Pre::none, T>
                            : g.pre == 1 ? conv_train_kernel<BlockN, Pre::identity, T>
                                         : conv_train_kernel<BlockN, Pre::relu, T>;
        if (!model::run_block(kThreads, g.seed + block, [&] { kernel(g.x, g.w, g.y, g.args); })) return 1;
    }
    return 0;
}

}  // namespace
}  // namespace fused_resnet::cuda

// sizes: n c k h w p q r s stride_h stride_w pad_h pad_w dil_h dil_w pre block_n blocks fp16 seed.
// 0: done, 1: a deadlock, 2: no such block_n.
extern "C" int conv_train(const int* z, uint16_t* x, uint16_t* w, const float* scale, const float* shift, uint16_t* y,
                          float* mean, float* m2) {
    using namespace fused_resnet::cuda;
    const Window v{z[3], z[4], z[5], z[6], z[7], z[8], z[9], z[10], z[11], z[12], z[13], z[14]};
    const int n = z[0], c = z[1], k = z[2], m = n * v.p * v.q;
    // as the launcher's matrix_map and image_map make them
    CUtensorMap images{x,
                       m,
                       c,
                       kBlockM,
                       n,
                       v.h,
                       v.w,
                       -v.pad_h,
                       -v.pad_w,
                       v.pad_h - v.dil_h * (v.r - 1),
                       v.pad_w - v.dil_w * (v.s - 1),
                       v.stride_h,
                       v.stride_w};
    const auto matrix = [](uint16_t* at, int64_t rows, int64_t columns, int box) {
        return CUtensorMap{at, rows, columns, box, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    };
    const Case g{{v, m, c, k, scale, shift, mean, m2},
                 images,
                 matrix(w, k, int64_t{v.count()} * c, z[16]),
                 matrix(y, m, k, kBlockM),
                 z[17],
                 z[15],
                 static_cast<unsigned>(z[19])};
    switch (z[16] + z[18]) {
        case 64: return run<64, BF16>(g);
        case 65: return run<64, F16>(g);
        case 128: return run<128, BF16>(g);
        case 256: return run<256, BF16>(g);
        default: return 2;
    }
}
