// Schemas of the compiled primitives, and the Python module that loads them. No logic.
#include <torch/library.h>
#include <torch/headeronly/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/ops/ops.h"
#ifdef FUSED_RESNET_WITH_CUDA
#include "cuda/ops.h"
#endif
// setup.py sets these macros. FUSED_RESNET_CUDA_ARCHS: the GPUs that the CUDA part is compiled for, as in
// TORCH_CUDA_ARCH_LIST. FUSED_RESNET_CUTLASS: CUTLASS's version, if its convolutions are part of the build.
#define FR_QUOTED(text) #text
#define FR_TEXT(macro) FR_QUOTED(macro)

TORCH_LIBRARY(fused_resnet_cpu, m) {
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
        "Tensor[] prologue, int act, float act_param, bool stats, ScalarType compute, bool gemm) "
        "-> (Tensor, Tensor, Tensor)");
    m.def(
        "conv_backward(Tensor dz, Tensor y, Tensor[] coef, Tensor x, Tensor[] prologue, int act, float act_param, "
        "Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, bool need_input, bool need_weight, "
        "Tensor(a!)? add, ScalarType compute, bool gemm) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "conv_bn_act(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor[] "
        "norm, "
        "int act, float act_param, Tensor? residual, ScalarType compute, bool gemm) -> Tensor");
    m.def(
        "row_forward(Tensor x, Tensor? residual, Tensor[] params, int[] ints, float[] reals, ScalarType compute, "
        "bool gemm) -> Tensor[]");
    m.def(
        "row_backward(Tensor dout, Tensor x, Tensor? residual, Tensor[] weights, Tensor[] saved, int[] ints, "
        "float[] reals, bool[] needs, ScalarType compute, bool gemm) -> Tensor[]");
    m.def(
        "row_inference(Tensor x, Tensor? residual, Tensor[] params, int[] ints, float[] reals, ScalarType compute, "
        "bool gemm) -> Tensor");
    m.def(
        "frozen_row(Tensor x, Tensor? residual, Tensor[] tensors, Tensor ints, Tensor reals, str[] post_ops) "
        "-> Tensor");
    m.def(
        "conv_algorithm(str kind, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "bool prologue, ScalarType compute, bool gemm) -> str");
    m.def(
        "winograd_suits(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) -> bool");
    m.def("winograd_tile(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups) -> int");
    m.def("winograd_prepack(Tensor weight, int tile) -> Tensor");
    m.def(
        "winograd_bias_act(Tensor x, Tensor packed, Tensor bias, int padding, int act, float act_param, Tensor? "
        "residual) "
        "-> Tensor");
    m.def("matmul(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
    m.def("pointwise_suits(Tensor x, Tensor weight, int[2] stride, int[2] padding, int groups) -> bool");
    m.def(
        "pointwise_bias_act(Tensor x, Tensor packed, Tensor bias, int act, float act_param, Tensor? residual, "
        "Tensor(a!) out) -> ()");
    m.def("stem_suits(Tensor x, Tensor weight, int[2] dilation, int groups, int[2] pool_kernel) -> bool");
    m.def("direct_prepack(Tensor weight) -> Tensor");
    m.def(
        "stem_bias_act_max_pool(Tensor x, Tensor packed, Tensor bias, int[2] stride, int[2] padding, int act, "
        "float act_param, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor");
}

// Defined in every build, so that schemas are the same everywhere; implemented only if csrc/cuda is compiled.
TORCH_LIBRARY(fused_resnet_cuda, m) {
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

TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, m) {
    namespace cpu = fused_resnet::cpu;
    m.impl("bn_stats", cpu::bn_stats);
    m.impl("bn_act", cpu::bn_act);
    m.impl("bn_act_backward", cpu::bn_act_backward);
    m.impl("bn_backward", cpu::bn_backward);
    m.impl("bn_act_max_pool", cpu::bn_act_max_pool);
    m.impl("bn_act_max_pool_backward", cpu::bn_act_max_pool_backward);
    m.impl("bn_fold", cpu::bn_fold);
    m.impl("bn_coefficients", cpu::bn_coefficients);
    m.impl("conv_stats", cpu::conv_stats);
    m.impl("conv_backward", cpu::conv_backward);
    m.impl("conv_bn_act", cpu::conv_bn_act);
    m.impl("row_forward", cpu::row_forward);
    m.impl("row_backward", cpu::row_backward);
    m.impl("row_inference", cpu::row_inference);
    m.impl("conv_algorithm", cpu::conv_algorithm);
    m.impl("winograd_suits", cpu::winograd_suits);
    m.impl("winograd_tile", cpu::winograd_tile);
    m.impl("winograd_prepack", cpu::winograd_prepack);
    m.impl("winograd_bias_act", cpu::winograd_bias_act);
    m.impl("matmul", cpu::matmul);
    m.impl("pointwise_suits", cpu::pointwise_suits);
    m.impl("pointwise_bias_act", cpu::pointwise_bias_act);
    m.impl("stem_suits", cpu::stem_suits);
    m.impl("direct_prepack", cpu::direct_prepack);
    m.impl("stem_bias_act_max_pool", cpu::stem_bias_act_max_pool);
}

// weights that oneDNN packed are its own kind of tensor
TORCH_LIBRARY_IMPL(fused_resnet_cpu, CPU, m) { m.impl("frozen_row", fused_resnet::cpu::frozen_row); }
TORCH_LIBRARY_IMPL(fused_resnet_cpu, MkldnnCPU, m) { m.impl("frozen_row", fused_resnet::cpu::frozen_row); }

#ifdef FUSED_RESNET_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_resnet_cuda, CUDA, m) { fused_resnet::cuda::ops::implement(m); }
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "The compiled part of fused_resnet: its operators live in torch.ops.fused_resnet_cpu and fused_resnet_cuda.";
    m.def(
        "build_info",
        [] {
            return std::map<std::string, std::string>{
                {"compiler", __VERSION__},
                {"torch", TORCH_VERSION},
                {"cpu_isa", fused_resnet::cpu::table().name},
#ifdef FUSED_RESNET_WITH_CUDA
                {"cuda", fused_resnet::cuda::built_with()},
                {"cuda_archs", FR_TEXT(FUSED_RESNET_CUDA_ARCHS)},
#else
                {"cuda", "not built"},     {"cuda_archs", "none"},
#endif
#ifdef FUSED_RESNET_CUTLASS
                {"cutlass", FR_TEXT(FUSED_RESNET_CUTLASS)},
#else
                {"cutlass", "none"},
#endif
            };
        },
        "How this extension was built and which instruction set it uses.");
    m.def(
        "cuda_status",
        []() -> std::string {
#ifdef FUSED_RESNET_WITH_CUDA
            const char* const status = fused_resnet::cuda::usable();
            return status == nullptr ? "" : status;
#else
            return "this build has no CUDA part";
#endif
        },
        "Why the CUDA kernels can't run on the current device, empty if they can.");
}
