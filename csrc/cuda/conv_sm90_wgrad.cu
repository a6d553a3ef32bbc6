#include "conv_sm90.cuh"

namespace fused_resnet::cuda {
template cudaError_t wgrad_sm90<cutlass::bfloat16_t, 128, 128>(const ConvProblem&, const ConvWgrad&, cudaStream_t);
template cudaError_t wgrad_sm90<cutlass::half_t, 128, 128>(const ConvProblem&, const ConvWgrad&, cudaStream_t);
template cudaError_t wgrad_sm90<cutlass::bfloat16_t, 64, 64>(const ConvProblem&, const ConvWgrad&, cudaStream_t);
template cudaError_t wgrad_sm90<cutlass::half_t, 64, 64>(const ConvProblem&, const ConvWgrad&, cudaStream_t);
}  // namespace fused_resnet::cuda
