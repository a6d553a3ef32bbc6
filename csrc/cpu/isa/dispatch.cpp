// Chooses the instruction set's table: the best that this machine runs, at most FUSED_RESNET_CPU_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels/kernels.h"

namespace fused_resnet::cpu {

namespace {
const Table& choose() {
    const char* wish = std::getenv("FUSED_RESNET_CPU_ISA");
    const std::string cap = wish && *wish ? wish : "avx512_bf16";
    if (cap != "default" && cap != "avx2" && cap != "avx512" && cap != "avx512_bf16")
        throw std::runtime_error("FUSED_RESNET_CPU_ISA: expected default, avx2, avx512 or avx512_bf16, got '" + cap +
                                 "'");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && cap == "avx512_bf16") return table_avx512_bf16;
    if (avx512 && cap != "avx2" && cap != "default") return table_avx512;
    if (avx2 && cap != "default") return table_avx2;
#endif
    return table_default;
}
}  // namespace

bool has_amx_bf16() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

const Table& table() {
    static const Table& chosen = choose();
    return chosen;
}

}  // namespace fused_resnet::cpu
