// Schemas of the compiled primitives, and which functions implement them. No logic.
#include <torch/headeronly/version.h>

#include "box.h"
#include "cpu/ops/bands.h"
#include "cpu/ops/ops.h"
#ifdef FUSED_RESNET_WITH_CUDA
#include "cuda/ops.h"
#endif
// setup.py sets these macros. FUSED_RESNET_CUDA_ARCHS: the GPUs that the CUDA part is compiled for, as in
// TORCH_CUDA_ARCH_LIST. FUSED_RESNET_CUTLASS: CUTLASS's version, if its convolutions are part of the build.
#define FR_QUOTED(text) #text
#define FR_TEXT(macro) FR_QUOTED(macro)

STABLE_TORCH_LIBRARY(fused_resnet_cpu, m) {
    m.def("bn_stats(Tensor y) -> (Tensor, Tensor)");
    m.def(
        "bn_act(Tensor y, Tensor[] norm, int act, float act_param, Tensor? residual, Tensor[] residual_norm, "
        "ScalarType out_dtype) -> Tensor");
    m.def(
        "bn_act_backward(Tensor dout, Tensor y, Tensor[] norm, int act, float act_param, Tensor? residual, "
        "Tensor[] residual_norm) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("bn_backward(Tensor dz, Tensor y, Tensor[] coef, ScalarType out_dtype) -> Tensor");
    m.def(
        "bn_act_max_pool(Tensor y, Tensor[] norm, int act, float act_param, int[2] kernel, int[2] stride, "
        "int[2] padding) -> (Tensor, Tensor)");
    m.def(
        "bn_act_max_pool_backward(Tensor dout, Tensor argmax, Tensor y, Tensor[] norm, int act, float act_param, "
        "int[2] kernel, int[2] stride, int[2] padding, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)");
    m.def(
        "bn_fold(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? conv_bias, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "bn_coefficients(Tensor scale, Tensor rstd, Tensor sum_dz, Tensor sum_dz_y, int? count) "
        "-> (Tensor, Tensor, Tensor)");
    m.def(
        "conv_stats(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "Tensor[] prologue, int act, float act_param, bool stats, ScalarType compute, bool gemm, int products) "
        "-> (Tensor, Tensor, Tensor)");
    m.def(
        "conv_backward(Tensor dz, Tensor y, Tensor[] coef, Tensor x, Tensor[] prologue, int act, float act_param, "
        "Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, bool need_input, bool need_weight, "
        "Tensor(a!)? add, ScalarType compute, bool gemm, int products) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "conv_bn_act(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor[] "
        "norm, "
        "int act, float act_param, Tensor? residual, ScalarType compute, bool gemm, int products) -> Tensor");
    m.def(
        "row_forward(Tensor x, Tensor? residual, Tensor[] params, Tensor ints, Tensor reals, "
        "ScalarType compute, bool gemm) -> Tensor[]");
    m.def(
        "row_backward(Tensor dout, Tensor x, Tensor? residual, Tensor[] weights, Tensor[] saved, Tensor ints, "
        "Tensor reals, Tensor needs, ScalarType compute, bool gemm) -> Tensor[]");
    m.def(
        "row_inference(Tensor x, Tensor? residual, Tensor[] params, Tensor ints, Tensor reals, "
        "ScalarType compute, bool gemm) -> Tensor");
    m.def("frozen_row(Tensor x, Tensor? residual, Tensor[] tensors, Tensor ints, Tensor reals) -> Tensor");
    m.def(
        "conv_algorithm(str kind, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "bool prologue, ScalarType compute, bool gemm, int products) -> str");
    m.def(
        "winograd_suits(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) -> bool");
    m.def("winograd_tile(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) -> int");
    m.def("winograd_prepack(Tensor weight, int tile) -> Tensor");
    m.def(
        "winograd_bias_act(Tensor x, Tensor packed, Tensor bias, int padding, int act, float act_param, Tensor? "
        "residual) "
        "-> Tensor");
    m.def("matmul(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
    m.def("gemm_suits(Tensor x, Tensor weight, int groups) -> bool");
    m.def("gemm_prepack(Tensor weight) -> Tensor");
    m.def(
        "gemm_bias_act(Tensor x, Tensor packed, Tensor bias, int[2] stride, int[2] padding, int[2] dilation, int act, "
        "float act_param, Tensor? residual, Tensor(a!) out) -> ()");
    m.def("depthwise_suits(Tensor x, Tensor weight, int groups) -> bool");
    m.def("depthwise_prepack(Tensor weight) -> Tensor");
    m.def(
        "depthwise_bias_act(Tensor x, Tensor packed, Tensor bias, int[2] stride, int[2] padding, int[2] dilation, "
        "int act, float act_param, Tensor? residual) -> Tensor");
    m.def("grouped_suits(Tensor x, Tensor weight, int[2] dilation, int groups) -> bool");
    m.def("grouped_prepack(Tensor weight, int groups) -> Tensor");
    m.def(
        "grouped_bias_act(Tensor x, Tensor packed, Tensor bias, int[2] stride, int[2] padding, int act, "
        "float act_param, Tensor? residual) -> Tensor");
    m.def(
        "excite(Tensor(a!) x, Tensor weight, Tensor bias, int act, float act_param, Tensor gate_weight, "
        "Tensor gate_bias, int gate, float gate_param) -> ()");
    m.def("channel_means(Tensor x) -> Tensor");
    m.def("bands_suit(Tensor x, int channels) -> bool");
    m.def("stem_suits(Tensor x, Tensor weight, int[2] dilation, int groups, int[2] pool_kernel) -> bool");
    m.def("stem_prepack(Tensor weight) -> Tensor");
    m.def(
        "stem_bias_act_max_pool(Tensor x, Tensor packed, Tensor bias, int[2] stride, int[2] padding, int act, "
        "float act_param, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor");
}

// Defined in every build, so that schemas are the same everywhere; implemented only if csrc/cuda is compiled.
STABLE_TORCH_LIBRARY(fused_resnet_cuda, m) {
    m.def("bn_stats(Tensor y) -> (Tensor, Tensor)");
    m.def(
        "bn_act(Tensor y, Tensor[] norm, int act, float act_param, Tensor? residual, Tensor[] residual_norm) -> "
        "Tensor");
    m.def(
        "bn_act_backward(Tensor dout, Tensor y, Tensor[] norm, int act, float act_param, Tensor? residual, "
        "Tensor[] residual_norm) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("bn_backward(Tensor dz, Tensor y, Tensor[] coef) -> Tensor");
    m.def(
        "bn_act_max_pool(Tensor y, Tensor[] norm, int act, float act_param, int[2] kernel, int[2] stride, "
        "int[2] padding) -> (Tensor, Tensor)");
    m.def(
        "bn_act_max_pool_backward(Tensor dout, Tensor argmax, Tensor y, Tensor[] norm, int act, float act_param, "
        "int[2] kernel, int[2] stride, int[2] padding) -> (Tensor, Tensor, Tensor)");
    m.def(
        "bn_fold(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? conv_bias, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "bn_coefficients(Tensor scale, Tensor rstd, Tensor sum_dz, Tensor sum_dz_y, int? count) "
        "-> (Tensor, Tensor, Tensor)");
    m.def("channels_last(Tensor t) -> Tensor");
    m.def("contiguous(Tensor t) -> Tensor");
    m.def(
        "conv_why_not(str kind, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) "
        "-> str?");
    m.def("conv_tiles(str kind, Tensor x) -> int[]");
    m.def(
        "conv_bias_act(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int "
        "groups, "
        "int act, float act_param, Tensor? residual, int[2] tile) -> Tensor");
    m.def(
        "conv_backward_input(Tensor dy, Tensor weight, int[2] size, int[2] stride, int[2] padding, int[2] dilation, "
        "int groups, Tensor? add, int[2] tile) -> Tensor");
    m.def(
        "conv_backward_weight(Tensor dy, Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
        "int groups, int[2] tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, m) {
    using namespace fused_resnet;
    m.impl("bn_stats", Boxed<cpu::bn_stats>::call);
    m.impl("bn_act", Boxed<cpu::bn_act>::call);
    m.impl("bn_act_backward", Boxed<cpu::bn_act_backward>::call);
    m.impl("bn_backward", Boxed<cpu::bn_backward>::call);
    m.impl("bn_act_max_pool", Boxed<cpu::bn_act_max_pool>::call);
    m.impl("bn_act_max_pool_backward", Boxed<cpu::bn_act_max_pool_backward>::call);
    m.impl("bn_fold", Boxed<cpu::bn_fold>::call);
    m.impl("bn_coefficients", Boxed<cpu::bn_coefficients>::call);
    m.impl("conv_stats", Boxed<cpu::conv_stats>::call);
    m.impl("conv_backward", Boxed<cpu::conv_backward>::call);
    m.impl("conv_bn_act", Boxed<cpu::conv_bn_act>::call);
    m.impl("row_forward", Boxed<cpu::row_forward>::call);
    m.impl("row_backward", Boxed<cpu::row_backward>::call);
    m.impl("row_inference", Boxed<cpu::row_inference>::call);
    m.impl("conv_algorithm", Boxed<cpu::conv_algorithm>::call);
    m.impl("winograd_suits", Boxed<cpu::winograd_suits>::call);
    m.impl("winograd_tile", Boxed<cpu::winograd_tile>::call);
    m.impl("winograd_prepack", Boxed<cpu::winograd_prepack>::call);
    m.impl("winograd_bias_act", Boxed<cpu::winograd_bias_act>::call);
    m.impl("matmul", Boxed<cpu::matmul>::call);
    m.impl("gemm_suits", Boxed<cpu::gemm_suits>::call);
    m.impl("gemm_prepack", Boxed<cpu::gemm_prepack>::call);
    m.impl("gemm_bias_act", Boxed<cpu::gemm_bias_act>::call);
    m.impl("depthwise_suits", Boxed<cpu::depthwise_suits>::call);
    m.impl("depthwise_prepack", Boxed<cpu::depthwise_prepack>::call);
    m.impl("depthwise_bias_act", Boxed<cpu::depthwise_bias_act>::call);
    m.impl("grouped_suits", Boxed<cpu::grouped_suits>::call);
    m.impl("grouped_prepack", Boxed<cpu::grouped_prepack>::call);
    m.impl("grouped_bias_act", Boxed<cpu::grouped_bias_act>::call);
    m.impl("excite", Boxed<cpu::excite>::call);
    m.impl("channel_means", Boxed<cpu::channel_means>::call);
    m.impl("bands_suit", Boxed<cpu::bands_suit>::call);
    m.impl("stem_suits", Boxed<cpu::stem_suits>::call);
    m.impl("stem_prepack", Boxed<cpu::stem_prepack>::call);
    m.impl("stem_bias_act_max_pool", Boxed<cpu::stem_bias_act_max_pool>::call);
}

// weights that oneDNN packed are its own kind of tensor
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, m) {
    m.impl("frozen_row", fused_resnet::Boxed<fused_resnet::cpu::frozen_row>::call);
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpu, MkldnnCPU, m) {
    m.impl("frozen_row", fused_resnet::Boxed<fused_resnet::cpu::frozen_row>::call);
}

#ifdef FUSED_RESNET_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cuda, CUDA, m) { fused_resnet::cuda::ops::implement(m); }
#endif

namespace {

// How this library was built and which instruction set it uses: names and values in turn.
std::vector<std::string> build_info() {
#ifdef FUSED_RESNET_WITH_CUDA
    const std::string cuda = fused_resnet::cuda::built_with(), archs = FR_TEXT(FUSED_RESNET_CUDA_ARCHS);
#else
    const std::string cuda = "not built", archs = "none";
#endif
#ifdef FUSED_RESNET_CUTLASS
    const std::string cutlass = FR_TEXT(FUSED_RESNET_CUTLASS);
#else
    const std::string cutlass = "none";
#endif
    return {"compiler", __VERSION__, "torch",      TORCH_VERSION, "cpu_isa", fused_resnet::cpu::table().name,
            "cuda",     cuda,        "cuda_archs", archs,         "cutlass", cutlass};
}

// Why the CUDA kernels can't run on the current device, empty if they can.
std::string cuda_status() {
#ifdef FUSED_RESNET_WITH_CUDA
    const char* const status = fused_resnet::cuda::usable();
    return status == nullptr ? "" : status;
#else
    return "this build has no CUDA part";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_resnet_library, m) {
    m.def("build_info() -> str[]");
    m.def("cuda_status() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(fused_resnet_library, CompositeExplicitAutograd, m) {
    m.impl("build_info", fused_resnet::Boxed<build_info>::call);
    m.impl("cuda_status", fused_resnet::Boxed<cuda_status>::call);
}
