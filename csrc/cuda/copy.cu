// NCHW <-> NHWC, and the check of whether this build runs on the device.
#include "device.cuh"

namespace fused_resnet::cuda {

namespace {

constexpr int kSide = 32, kHeight = kThreads / kSide;

// out[n][column][row] = in[n][row][column].
// Tile: 32 x 32 elements through shared memory, padded by one to avoid bank conflicts. Reads and writes are runs of 32
// elements (64 bytes of 16-bit ones). Traffic: each element read and written once.
// Source: Ruetsch and Micikevicius, Optimizing Matrix Transpose in CUDA, 2009.
template <class W>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const int64_t images, const int64_t rows, const int64_t columns, const W* in, W* out) {
    FR_SHARED(W, tile);
    const unsigned across = unsigned((columns + kSide - 1) / kSide);
    const int64_t column = int64_t(blockIdx.x % across) * kSide, row = int64_t(blockIdx.x / across) * kSide;
    const int64_t n = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
    if (n >= images) return;  // the whole block
    const W* from = in + n * rows * columns;
    W* to = out + n * rows * columns;
#pragma unroll
    for (int i = 0; i < kSide; i += kHeight) {
        const int64_t r = row + i + threadIdx.y, c = column + threadIdx.x;
        if (r < rows && c < columns)
            tile[(i + threadIdx.y) * (kSide + 1) + threadIdx.x] = __ldg(from + r * columns + c);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSide; i += kHeight) {
        const int64_t r = row + threadIdx.x, c = column + i + threadIdx.y;
        if (r < rows && c < columns) to[c * rows + r] = tile[threadIdx.x * (kSide + 1) + i + threadIdx.y];
    }
}

template <class W>
Status transpose_of(int64_t images, int64_t rows, int64_t columns, const void* in, void* out, Stream stream) {
    const int64_t tiles = (rows + kSide - 1) / kSide * ((columns + kSide - 1) / kSide);
    const unsigned most = 65535, down = unsigned(images < most ? images : most);
    const dim3 grid(unsigned(tiles), down, down > 0 ? unsigned((images + down - 1) / down) : 1);
    return launch(transpose_kernel<W>, grid, dim3(kSide, kHeight), sizeof(W) * kSide * (kSide + 1), stream, images,
                  rows, columns, static_cast<const W*>(in), static_cast<W*>(out));
}

}  // namespace

Status transpose(int element_size, int64_t images, int64_t rows, int64_t columns, const void* in, void* out,
                 Stream stream) {
    switch (element_size) {
        case 1: return transpose_of<unsigned char>(images, rows, columns, in, out, stream);
        case 2: return transpose_of<unsigned short>(images, rows, columns, in, out, stream);
        case 4: return transpose_of<unsigned>(images, rows, columns, in, out, stream);
        case 8: return transpose_of<unsigned long long>(images, rows, columns, in, out, stream);
        default: return "elements of 1, 2, 4 or 8 bytes are copied";
    }
}

#ifdef __CUDACC__
#define FR_QUOTED(text) #text
#define FR_TEXT(macro) FR_QUOTED(macro)
const char* built_with() { return FR_TEXT(__CUDACC_VER_MAJOR__) "." FR_TEXT(__CUDACC_VER_MINOR__); }

Status usable() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, transpose_kernel<unsigned>);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}
#endif

}  // namespace fused_resnet::cuda
