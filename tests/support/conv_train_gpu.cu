// csrc/cuda/conv_train_sm90.cu on a GPU, behind the C function of conv_train_host.cpp, for benchmarks/first_light.py.
#include "../../csrc/cuda/conv_train_sm90.cu"

// sizes: n c k h w p q r s stride_h stride_w pad_h pad_w dil_h dil_w pre block_n blocks fp16 seed. The rest are
// addresses of the GPU's memory. Returns CUDA's status.
extern "C" int conv_train(const int* z, const void* x, const void* w, const float* scale, const float* shift, void* y,
                          float* mean, float* m2) {
    using namespace fused_resnet;
    using namespace fused_resnet::cuda;
    const ConvProblem problem{z[0], z[3],  z[4],  z[1],  z[2],  z[7],  z[8],
                              z[9], z[10], z[11], z[12], z[13], z[14], z[18] ? ConvType::f16 : ConvType::bf16};
    const bool plain = z[15] == 0;
    const ConvTrain train{
        x, w, plain ? nullptr : scale, plain ? nullptr : shift, z[15] == 2 ? Act::relu : Act::identity, y, mean, m2};
    return conv_train_sm90(problem, train, nullptr);
}
