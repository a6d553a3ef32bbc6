// The kernels for AVX512 with BF16.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

// after the includes: not for the standard library
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define FR_VECTOR_BYTES 64
#define FR_REGISTERS 32
#define FR_BF16
#include "../kernels/dispatch.h"

namespace fused_resnet::cpu {
extern const Table table_avx512_bf16 = {
#define FR_KERNEL(name, ...) name##_any,
#include "../kernels/kernels.inc"
    "avx512_bf16", FR_REGISTERS, kGemmKernel<float>, kGemmKernel<bf16>};
}  // namespace fused_resnet::cpu
