// AVX512's products of bfloat16 matrices.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")  // after the includes: not for the
                                                                                   // standard library
#define FR_VECTOR_BYTES 64
#define FR_REGISTERS 32
#include "../kernels/gemm.h"

namespace {
template <>
struct Word<bf16> {
    using type = uint32_t;
    using vector = U32;
    static FR_INLINE F32 add(F32 sum, U32 a, U32 b) {
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
}  // namespace

namespace fused_resnet::cpu {
extern const GemmKernel bf16_gemm_avx512 = gemm_kernel<bf16>();
}  // namespace fused_resnet::cpu
