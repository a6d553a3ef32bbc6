// The kernels for the compiler's default target, which every machine runs.
#include <cmath>
#include <cstdint>
#include <type_traits>

#define FR_VECTOR_BYTES 16
#define FR_REGISTERS 16
#include "../kernels/dispatch.h"

namespace fused_resnet::cpu {
extern const Table table_default = {
#define FR_KERNEL(name, ...) name##_any,
#include "../kernels/kernels.inc"
    "default", FR_REGISTERS, kGemmKernel<float>, kGemmKernel<float, bf16>};
}  // namespace fused_resnet::cpu
