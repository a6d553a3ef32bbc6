// What the CUDA convolutions refuse and which instance they choose, for tests/backends/test_cuda_conv_choice.py: the
// files that decide, with stubs for what CUTLASS compiles. Nothing of it needs a GPU.
#include <cstdint>
#include <type_traits>

#include "../../csrc/cuda/conv_sm90.h"

namespace fused_resnet::cuda {

// Of the stub that ran last: 0 fprop, 1 dgrad, 2 wgrad; its ConvType; M; N.
int ran[4];

template <class T, int M, int N>
cudaError_t note(int which) {
    const bool half = std::is_same_v<T, cutlass::half_t>, single = std::is_same_v<T, float>;
    const ConvType type = single ? ConvType::tf32 : half ? ConvType::f16 : ConvType::bf16;
    ran[0] = which, ran[1] = static_cast<int>(type), ran[2] = M, ran[3] = N;
    return cudaSuccess;
}
template <class T, int M, int N>
cudaError_t fprop_sm90(const ConvProblem&, const ConvInference&, cudaStream_t) {
    return note<T, M, N>(0);
}
template <class T, int M, int N>
cudaError_t dgrad_sm90(const ConvProblem&, const ConvDgrad&, cudaStream_t) {
    return note<T, M, N>(1);
}
template <class T, int M, int N>
cudaError_t wgrad_sm90(const ConvProblem&, const ConvWgrad&, cudaStream_t) {
    return note<T, M, N>(2);
}

}  // namespace fused_resnet::cuda

#include "../../csrc/cuda/conv_sm90.cu"
#include "../../csrc/cuda/conv_train_sm90.cu"

using namespace fused_resnet::cuda;

namespace {

// sizes: n h w c k r s stride_h stride_w pad_h pad_w dil_h dil_w type
ConvProblem problem(const int* z) {
    return {z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7], z[8], z[9], z[10], z[11], z[12], ConvType(z[13])};
}

}  // namespace

// kind: 0 fprop, 1 dgrad, 2 wgrad, 3 training
extern "C" const char* why_not(int kind, const int* sizes, int act) {
    const ConvProblem g = problem(sizes);
    if (kind == 0) return conv_fprop_sm90_why_not(g);
    if (kind == 1) return conv_dgrad_sm90_why_not(g);
    if (kind == 2) return conv_wgrad_sm90_why_not(g);
    return conv_train_sm90_why_not(g, static_cast<fused_resnet::Act>(act));
}

extern "C" int tiles(int kind, int type, int* to) {
    ConvTile found[kConvTiles];
    const auto list = kind == 0 ? conv_fprop_sm90_tiles : kind == 1 ? conv_dgrad_sm90_tiles : conv_wgrad_sm90_tiles;
    const int count = list(ConvType(type), found);
    for (int i = 0; i < count; ++i) to[2 * i] = found[i].m, to[2 * i + 1] = found[i].n;
    return count;
}

extern "C" int launch(int kind, const int* sizes, int m, int n, int* who) {
    const ConvProblem g = problem(sizes);
    for (int& v : ran) v = -1;
    const cudaError_t status = kind == 0   ? conv_fprop_sm90(g, {m, n}, {}, nullptr)
                               : kind == 1 ? conv_dgrad_sm90(g, {m, n}, {}, nullptr)
                               : kind == 2 ? conv_wgrad_sm90(g, {m, n}, {}, nullptr)
                                           : conv_train_sm90(g, {}, nullptr);
    for (int i = 0; i < 4; ++i) who[i] = ran[i];
    return status;
}
