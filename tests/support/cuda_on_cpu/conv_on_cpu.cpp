// In the place of what CUTLASS compiles (csrc/cuda/conv_sm90_*.cu): loops that do what conv.h promises, so that all the
// rest, from the Python call to the launcher that picks an instance, runs where there is no GPU.
#include <vector>

#include "conv_sm90.h"
#include "kernels.h"

#include "cuda_on_cpu.h"

namespace cutlass {
struct bfloat16_t {
    __nv_bfloat16 value;
};
struct half_t {
    __half value;
};
}  // namespace cutlass

namespace fused_resnet::cuda {
namespace {

int runs = 0;       // since the library was loaded
bool idle = false;  // launches succeed and write nothing

float load(float v) { return v; }
float load(cutlass::bfloat16_t v) { return __bfloat162float(v.value); }
float load(cutlass::half_t v) { return __half2float(v.value); }
void store(float& to, float v) { to = v; }
void store(cutlass::bfloat16_t& to, float v) { to.value = __float2bfloat16_rn(v); }
void store(cutlass::half_t& to, float v) { to.value = __float2half_rn(v); }

template <class T>
std::vector<float> loaded(const void* from, size_t count) {
    std::vector<float> to(count);
    for (size_t i = 0; i < count; i++) to[i] = load(static_cast<const T*>(from)[i]);
    return to;
}

// f(place in x, in w, in y) of every product.
template <class F>
void products(const ConvProblem& g, F f) {
    for (int n = 0; n < g.n; n++)
        for (int p = 0; p < g.p(); p++)
            for (int q = 0; q < g.q(); q++)
                for (int r = 0; r < g.r; r++)
                    for (int s = 0; s < g.s; s++) {
                        const int h = p * g.stride_h - g.pad_h + r * g.dil_h,
                                  w = q * g.stride_w - g.pad_w + s * g.dil_w;
                        if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
                        const size_t x = ((size_t(n) * g.h + h) * g.w + w) * g.c,
                                     y = ((size_t(n) * g.p() + p) * g.q() + q) * g.k;
                        for (int k = 0; k < g.k; k++)
                            for (int c = 0; c < g.c; c++) f(x + c, ((size_t(k) * g.r + r) * g.s + s) * g.c + c, y + k);
                    }
}

float apply(Act act, float z, float param) {
    switch (act) {
#define FR_CASE(name) \
    case Act::name: return fused_resnet::act<Act::name>(z, param);
        FR_ACTS(FR_CASE)
#undef FR_CASE
    }
    return z;
}

// Whether TMA could take the addresses; null is no address.
template <class... P>
bool aligned(const P*... p) {
    return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

struct Counts {
    size_t x, w, y;
    explicit Counts(const ConvProblem& g)
        : x(size_t(g.n) * g.h * g.w * g.c), w(size_t(g.k) * g.r * g.s * g.c), y(size_t(g.pixels()) * g.k) {}
};

}  // namespace

template <class T, int M, int N>
cudaError_t fprop_sm90(const ConvProblem& g, const ConvInference& t, cudaStream_t) {
    if (!aligned(t.x, t.w, t.bias, t.residual, t.y)) return cudaErrorUnknown;
    runs++;
    if (idle) return cudaSuccess;
    const Counts count(g);
    const std::vector<float> x = loaded<T>(t.x, count.x), w = loaded<T>(t.w, count.w);
    std::vector<float> sum(count.y);
    products(g, [&](size_t i, size_t j, size_t o) { sum[o] += x[i] * w[j]; });
    for (size_t o = 0; o < count.y; o++) {
        float z = sum[o] + (t.bias ? t.bias[o % g.k] : 0);
        if (t.residual) z += load(static_cast<const T*>(t.residual)[o]);
        store(static_cast<T*>(t.y)[o], apply(t.act, z, t.act_param));
    }
    return cudaSuccess;
}

template <class T, int M, int N>
cudaError_t dgrad_sm90(const ConvProblem& g, const ConvDgrad& t, cudaStream_t) {
    if (!aligned(t.dy, t.w, t.add, t.dx)) return cudaErrorUnknown;
    runs++;
    if (idle) return cudaSuccess;
    const Counts count(g);
    const std::vector<float> dy = loaded<T>(t.dy, count.y), w = loaded<T>(t.w, count.w);
    std::vector<float> sum(count.x);
    products(g, [&](size_t i, size_t j, size_t o) { sum[i] += dy[o] * w[j]; });
    for (size_t i = 0; i < count.x; i++)
        store(static_cast<T*>(t.dx)[i], sum[i] + (t.add ? load(static_cast<const T*>(t.add)[i]) : 0));
    return cudaSuccess;
}

template <class T, int M, int N>
cudaError_t wgrad_sm90(const ConvProblem& g, const ConvWgrad& t, cudaStream_t) {
    if (!aligned(t.dy, t.x, t.dw)) return cudaErrorUnknown;
    runs++;
    if (idle) return cudaSuccess;
    const Counts count(g);
    const std::vector<float> dy = loaded<T>(t.dy, count.y), x = loaded<T>(t.x, count.x);
    for (size_t j = 0; j < count.w; j++) t.dw[j] = 0;
    products(g, [&](size_t i, size_t j, size_t o) { t.dw[j] += dy[o] * x[i]; });
    return cudaSuccess;
}

#define FR_INSTANCES(T, M, N)                                                                         \
    template cudaError_t fprop_sm90<T, M, N>(const ConvProblem&, const ConvInference&, cudaStream_t); \
    template cudaError_t dgrad_sm90<T, M, N>(const ConvProblem&, const ConvDgrad&, cudaStream_t);     \
    template cudaError_t wgrad_sm90<T, M, N>(const ConvProblem&, const ConvWgrad&, cudaStream_t);
#define FR_TILES(T) FR_INSTANCES(T, 128, 128) FR_INSTANCES(T, 128, 64) FR_INSTANCES(T, 64, 64)
FR_TILES(cutlass::bfloat16_t)
FR_TILES(cutlass::half_t)
FR_TILES(float)

}  // namespace fused_resnet::cuda

extern "C" int fused_resnet_cuda_on_cpu_conv_runs() { return fused_resnet::cuda::runs; }
extern "C" void fused_resnet_cuda_on_cpu_conv_idle(bool on) { fused_resnet::cuda::idle = on; }
