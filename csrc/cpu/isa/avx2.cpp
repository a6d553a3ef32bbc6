// The kernels for AVX2.
#include <cmath>
#include <cstdint>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c")  // from here on, and so never for the standard library
#define FR_WIDE_REGISTERS 8  // 64-byte vectors that the instruction set holds
#include "../kernels_impl.h"

namespace fused_resnet::cpu {
extern const Table table_avx2 = {
    bn_act_any,         bn_act_backward_any, bn_backward_any,     moments_any,          bn_act_max_pool_any,
    bn_act_max_pool_backward_any, winograd_input_any, winograd_output_any, winograd_weight_any, stem_any, pointwise_any, "avx2", FR_WIDE_REGISTERS};
}
