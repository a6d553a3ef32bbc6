// torch.ops.fused_resnet_cuda for CPU tensors: ops.cpp and the kernels as they are, under cuda_on_cpu.h.
#include "ops.h"

#include "cuda_on_cpu.h"

namespace fused_resnet::cuda {

Stream current_stream(const Tensor&) { return nullptr; }

}  // namespace fused_resnet::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CPU, m) { fused_resnet::cuda::ops::implement(m); }

// Threads and blocks in the opposite order, from now on.
extern "C" void fused_resnet_cuda_on_cpu_backwards(bool on) { cuda_on_cpu::backwards = on; }
