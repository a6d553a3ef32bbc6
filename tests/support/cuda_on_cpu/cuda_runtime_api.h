// Of CUDA's runtime library, what csrc/cuda/conv.h and conv_ops.cpp ask for.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorNotSupported = 801, cudaErrorUnknown = 999 };
using cudaStream_t = struct CUstream_st*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorNotSupported ? "operation not supported" : status == cudaSuccess ? "no error" : "unknown error";
}
