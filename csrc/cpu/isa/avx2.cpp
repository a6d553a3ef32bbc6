// The kernels for AVX2.
#include <cmath>
#include <cstdint>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c")  // after the includes: not for the standard library
#define FR_VECTOR_BYTES 32
#define FR_REGISTERS 16
#include "../kernels/dispatch.h"

namespace fused_resnet::cpu {
extern const Table table_avx2 = {
#define FR_KERNEL(name, ...) name##_any,
#include "../kernels/kernels.inc"
    "avx2", FR_REGISTERS, kGemmKernel<float>, kGemmKernel<float, bf16>};
}  // namespace fused_resnet::cpu
