// Shared by the files of the sm_90 convolutions. Each file compiles a few instances of one template (CUTLASS takes most
// of a minute for one); conv_sm90.cu chooses among them.
#pragma once

#include "conv.h"

namespace cutlass {
struct bfloat16_t;
struct half_t;
}  // namespace cutlass

namespace fused_resnet::cuda {

// CUTLASS reports that a launch failed, but not why; CUDA may report the reason.
inline cudaError_t launch_error() {
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? cudaErrorUnknown : status;
}

// T is float for tf32.
template <class T, int M, int N>
cudaError_t fprop_sm90(const ConvProblem&, const ConvInference&, cudaStream_t);
template <class T, int M, int N>
cudaError_t dgrad_sm90(const ConvProblem&, const ConvDgrad&, cudaStream_t);
template <class T, int M, int N>
cudaError_t wgrad_sm90(const ConvProblem&, const ConvWgrad&, cudaStream_t);

}  // namespace fused_resnet::cuda
