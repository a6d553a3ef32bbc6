// The one function of PyTorch's CUDA part. Its library is not there in a CPU build, so this one can't be linked with
// it.
#include <dlfcn.h>

#include "ops.h"

namespace fused_resnet::cuda {

Stream current_stream(const Tensor& t) {
    using Get = AOTITorchError (*)(int32_t device, void** stream);
    static const Get get = [] {
        void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // which is loaded
        return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    FR_CHECK(get, "this torch has no CUDA part");
    void* stream = nullptr;
    fused_resnet::check(get(t.options().index, &stream), "the current stream");
    return static_cast<Stream>(stream);
}

}  // namespace fused_resnet::cuda
