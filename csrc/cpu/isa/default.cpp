// The kernels for any machine the compiler's default target runs on.
#include <cmath>
#include <cstdint>
#include <type_traits>

#define FR_WIDE_REGISTERS 4  // 64-byte vectors that the instruction set holds
#include "../kernels_impl.h"

namespace fused_resnet::cpu {
extern const Table table_default = {
    bn_act_any,         bn_act_backward_any, bn_backward_any,     moments_any,          bn_act_max_pool_any,
    bn_act_max_pool_backward_any, winograd_input_any, winograd_output_any, winograd_weight_any, stem_any, pointwise_any, "default", FR_WIDE_REGISTERS};
}
