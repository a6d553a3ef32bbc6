// oneDNN's convolutions with what follows them, as inductor's compiled models call them. PyTorch's operators for them
// take numbers (Scalar?[]), which its stable ABI does not hand on. Weak: a torch without
// oneDNN has none of them, and packs no weights for them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

// act(conv(x) + bias), with the activation's numbers
__attribute__((weak)) AOTITorchError aoti_torch_cpu_mkldnn__convolution_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const int64_t* padding, int64_t paddings,
    const int64_t* stride, int64_t strides, const int64_t* dilation, int64_t dilations, int64_t groups, const char* act,
    const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);

// act(conv(x) + bias + alpha summand); the second in the summand's memory
#define FR_SUMMED(name, first, second)                                                                             \
    __attribute__((weak)) AOTITorchError name(                                                                     \
        AtenTensorHandle first, AtenTensorHandle second, AtenTensorHandle weight, AtenTensorHandle* bias,          \
        const int64_t* padding, int64_t paddings, const int64_t* stride, int64_t strides, const int64_t* dilation, \
        int64_t dilations, int64_t groups, const char* binary, double* alpha, const char** act,                    \
        const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);
FR_SUMMED(aoti_torch_cpu_mkldnn__convolution_pointwise_binary, x, summand)
FR_SUMMED(aoti_torch_cpu_mkldnn__convolution_pointwise_binary_, summand, x)
#undef FR_SUMMED
}
