#include "conv_sm90.cuh"

namespace fused_resnet::cuda {
template cudaError_t fprop_sm90<cutlass::bfloat16_t, 128, 128>(const ConvProblem&, const ConvInference&, cudaStream_t);
template cudaError_t fprop_sm90<cutlass::half_t, 128, 128>(const ConvProblem&, const ConvInference&, cudaStream_t);
}  // namespace fused_resnet::cuda
