// Tensors and PyTorch's operators through its stable ABI, C functions that every torch from 2.11 on has under the same
// names: one build of the library runs under all of them. Used by all operators; the kernels take raw pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bn_math.h"
#include "dtype.h"

namespace fused_resnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
template <class T>
using List = torch::headeronly::HeaderOnlyArrayRef<T>;
using IntList = List<int64_t>;

inline std::ostream& operator<<(std::ostream& to, IntList list) {
    to << '[';
    for (size_t i = 0; i < list.size(); i++) to << (i ? ", " : "") << list[i];
    return to << ']';
}

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream to;
    (to << ... << parts);
    return to.str();
}

// RuntimeError in Python. (STD_TORCH_CHECK's messages begin with the place in the source.)
#define FR_CHECK(condition, ...)                                                     \
    do {                                                                             \
        if (!(condition)) throw std::runtime_error(fused_resnet::text(__VA_ARGS__)); \
    } while (false)

// Raises what PyTorch says of a call of one of its functions that failed.
[[noreturn]] void failed(const char* what);
inline void check(AOTITorchError status, const char* what) {
    if (status != 0) failed(what);
}

// The size of a convolution's or a pool's result in one dimension.
inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation = 1) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

inline int64_t element_size(ScalarType type) {
    switch (type) {
        case ScalarType::Double: return 8;
        case ScalarType::Float: return 4;
        case ScalarType::BFloat16:
        case ScalarType::Half: return 2;
        default: return static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(type)));
    }
}

// `name`: the tensor's, with a colon.
inline DType dtype_of(ScalarType type, const char* name = "") {
    switch (type) {
        case ScalarType::Double: return DType::f64;
        case ScalarType::Float: return DType::f32;
        case ScalarType::BFloat16: return DType::bf16;
        case ScalarType::Half: return DType::f16;
        default: break;
    }
    throw std::runtime_error(text(name, "expected float32, bfloat16, float16 or float64, got ", type));
}

inline Act act_of(int64_t index) {
    FR_CHECK(index >= 0 && index < kActs, "act: no activation ", index);
    return static_cast<Act>(index);
}

// What a new tensor has beside its sizes. The numbers of dtypes and devices never change: files hold them.
constexpr int32_t kCpu = 0, kCuda = 1;
struct Options {
    ScalarType type;
    int32_t device = kCpu, index = -1;

    Options dtype(ScalarType other) const { return {other, device, index}; }
    bool operator==(const Options& o) const { return type == o.type && device == o.device && index == o.index; }
};

inline std::ostream& operator<<(std::ostream& to, const Options& o) {
    return to << o.type << " on " << (o.device == kCpu ? "cpu" : text("cuda:", o.index));
}

// Whether a tensor [N, C, H, W] has no gaps, its dimensions in the order of the format.
bool is_dense(IntList sizes, IntList strides, MemoryFormat format);

// A handle of one of PyTorch's tensors, or undefined.
class Tensor {
    AtenTensorHandle handle = nullptr;

    template <class T>
    T read(AOTITorchError (*get)(AtenTensorHandle, T*), const char* what) const {
        T value;
        check(get(handle, &value), what);
        return value;
    }

  public:
    Tensor() = default;
    explicit Tensor(AtenTensorHandle owned) : handle(owned) {}
    Tensor(const Tensor& other) {
        if (other.defined()) check(aoti_torch_new_tensor_handle(other.handle, &handle), "a tensor's handle");
    }
    Tensor(Tensor&& other) noexcept : handle(other.release()) {}
    Tensor& operator=(Tensor other) noexcept {
        std::swap(handle, other.handle);
        return *this;
    }
    ~Tensor() {
        if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
    }

    AtenTensorHandle get() const { return handle; }
    AtenTensorHandle release() { return std::exchange(handle, nullptr); }
    bool defined() const { return handle != nullptr; }

    int64_t dim() const { return read(aoti_torch_get_dim, "dim"); }
    int64_t numel() const { return read(aoti_torch_get_numel, "numel"); }
    IntList sizes() const { return {read(aoti_torch_get_sizes, "sizes"), size_t(dim())}; }
    IntList strides() const { return {read(aoti_torch_get_strides, "strides"), size_t(dim())}; }
    int64_t size(int64_t d) const { return sizes().at(d); }
    int64_t stride(int64_t d) const { return strides().at(d); }
    ScalarType scalar_type() const { return static_cast<ScalarType>(read(aoti_torch_get_dtype, "dtype")); }
    int64_t element_size() const { return fused_resnet::element_size(scalar_type()); }
    Options options() const {
        return {scalar_type(), read(aoti_torch_get_device_type, "device"), read(aoti_torch_get_device_index, "device")};
    }
    bool is_contiguous(MemoryFormat format = MemoryFormat::Contiguous) const {
        return format == MemoryFormat::ChannelsLast ? is_channels_last()
                                                    : read(aoti_torch_is_contiguous, "is_contiguous");
    }
    bool is_channels_last() const { return is_dense(sizes(), strides(), MemoryFormat::ChannelsLast); }
    void* data_ptr() const { return read(aoti_torch_get_data_ptr, "data_ptr"); }
    // The memory's start, which all views of it share.
    const void* storage() const {
        return static_cast<const char*>(data_ptr()) -
               read(aoti_torch_get_storage_offset, "storage_offset") * element_size();
    }

    // Whether its strides are in the order of channels_last.
    bool suggests_channels_last() const;

    // The tensor itself where it is like that already.
    Tensor contiguous(MemoryFormat format = MemoryFormat::Contiguous) const;
    Tensor to(ScalarType type) const;

    Tensor clone() const;
    // Another view of the memory, whose first element is `offset` after this one's.
    Tensor view(IntList sizes, IntList strides, int64_t offset = 0) const;
    Tensor narrow(int64_t d, int64_t length) const;
    // Elements 0, step, 2 step ... of the dimension.
    Tensor every(int64_t d, int64_t step) const;
};
using OptTensor = std::optional<Tensor>;
// What a function of PyTorch's returned, which may hold no tensor.
inline Tensor returned(AtenTensorHandle handle) {
    Tensor t(handle);
    bool defined = false;
    check(aoti_torch_is_defined(handle, &defined), "a tensor's handle");
    return defined ? std::move(t) : Tensor();
}
using TensorList = List<Tensor>;

// The dtype of statistics and per-channel vectors.
inline ScalarType wide(const Tensor& t) {
    return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Undefined values.
Tensor empty(IntList sizes, const Options& options, MemoryFormat format = MemoryFormat::Contiguous);
Tensor empty_strided(IntList sizes, IntList strides, const Options& options);
Tensor zeros(IntList sizes, const Options& options, MemoryFormat format = MemoryFormat::Contiguous);
// A tensor of memory that outlives it.
Tensor from_memory(void* data, IntList sizes, IntList strides, ScalarType type);
void copy(const Tensor& to, const Tensor& from);

// What a profiler sees of a scope: a step's name, and its tensors' shapes.
class Profiled {
    AtenRecordFunctionHandle record = nullptr;

  public:
    Profiled(const char* name, std::initializer_list<const Tensor*> tensors) {
        std::vector<C10IValueHandle> inputs;
        for (const Tensor* t : tensors) {
            inputs.push_back(nullptr);
            check(aoti_torch_tensor_to_ivalue(t->get(), &inputs.back()), name);
        }
        const AOTITorchError status = aoti_record_function_start(name, nullptr, inputs.data(), inputs.size(), &record);
        for (const C10IValueHandle input : inputs) aoti_torch_delete_c10_value_object(input);
        check(status, name);
    }
    ~Profiled() { aoti_record_function_end(record); }
    Profiled(const Profiled&) = delete;
};

// PyTorch's convolution, and its gradients of the input and of the weight, undefined where they are not needed.
Tensor conv2d(const Tensor& x, const Tensor& weight, const OptTensor& bias, IntList stride, IntList padding,
              IntList dilation, int64_t groups);
std::pair<Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, IntList stride,
                                          IntList padding, IntList dilation, int64_t groups, bool need_input,
                                          bool need_weight);

}  // namespace fused_resnet

// What PyTorch's stable ABI makes of our tensors.
namespace torch::stable::detail {
template <>
struct FromImpl<fused_resnet::Tensor> {
    static StableIValue call(const fused_resnet::Tensor& t, uint64_t, bool) {
        AtenTensorHandle handle;
        fused_resnet::check(
            t.defined() ? aoti_torch_new_tensor_handle(t.get(), &handle) : aoti_torch_new_uninitialized_tensor(&handle),
            "a tensor's handle");
        return torch::stable::detail::from(handle);
    }
};
template <>
struct ToImpl<fused_resnet::Tensor> {
    static fused_resnet::Tensor call(StableIValue value, uint64_t, bool) {
        return fused_resnet::returned(torch::stable::detail::to<AtenTensorHandle>(value));
    }
};
}  // namespace torch::stable::detail

namespace fused_resnet {

struct Operator {
    const char *name, *overload;
    Operator(const char* name, const char* overload = "") : name(name), overload(overload) {}
};

// The results of one of PyTorch's operators, for all of its arguments.
template <size_t results = 1, class... Arguments>
std::array<Tensor, results> call(const Operator& op, const Arguments&... arguments) {
    static_assert(results <= sizeof...(arguments));
    StableIValue stack[] = {torch::stable::detail::from(arguments)...};
    check(torch_call_dispatcher(op.name, op.overload, stack, TORCH_ABI_VERSION), op.name);
    std::array<Tensor, results> found;
    for (size_t i = 0; i < results; i++) found[i] = torch::stable::detail::to<Tensor>(stack[i]);
    return found;
}

// Tensors that C functions return.
template <class... Arguments, class... Given>
Tensor made(AOTITorchError (*function)(Arguments...), const char* name, Given... given) {
    AtenTensorHandle handle = nullptr;
    check(function(given..., &handle), name);
    return Tensor(handle);
}

}  // namespace fused_resnet
