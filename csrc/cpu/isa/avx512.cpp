// The kernels for AVX512.
#include <cmath>
#include <cstdint>
#include <type_traits>

#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")  // after the includes: not for the standard library
#define FR_VECTOR_BYTES 64
#define FR_REGISTERS 32
#include "../kernels/dispatch.h"

namespace fused_resnet::cpu {
extern const Table table_avx512 = {
#define FR_KERNEL(name, ...) name##_any,
#include "../kernels/kernels.inc"
    "avx512", FR_REGISTERS, kGemmKernel<float>, kGemmKernel<float, bf16>};
}  // namespace fused_resnet::cpu
