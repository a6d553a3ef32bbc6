// The types of the tensors that kernels take.
#pragma once

namespace fused_resnet {

enum class DType : int { f64, f32, bf16, f16 };

}  // namespace fused_resnet
