// Functions of tensors as PyTorch's stable ABI calls them: Boxed<function>::call for StableLibrary::impl. (TORCH_BOX is
// for its own class of tensors, and copies the results.)
#pragma once

#include <string>
#include <string_view>
#include <tuple>

#include "tensor.h"

namespace fused_resnet {

// A few integers, as of sizes.
class Ints {
    std::array<int64_t, 8> values;
    size_t count = 0;

  public:
    void reserve(size_t size) const {
        FR_CHECK(size <= values.size(), "expected at most ", values.size(), " integers, got ", size);
    }
    void push_back(int64_t value) { values[count++] = value; }
    operator IntList() const { return {values.data(), count}; }
};

// What holds an argument during the call.
template <class T>
struct Held {
    using type = T;
};
template <>
struct Held<TensorList> {
    using type = std::vector<Tensor>;
};
template <>
struct Held<IntList> {
    using type = Ints;
};
template <>
struct Held<std::string_view> {
    using type = std::string;
};
template <class T>
using HeldOf = typename Held<std::decay_t<T>>::type;

// An argument from the stack, which it then owns.
template <class T>
struct Take {
    static T from(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Take<Tensor> {
    static Tensor from(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Take<ScalarType> {
    static ScalarType from(StableIValue value) { return static_cast<ScalarType>(static_cast<int32_t>(value)); }
};
template <class List, class Add>
List take_list(StableIValue value, const Add& add) {
    struct Owner {
        StableListHandle handle;
        ~Owner() { torch_delete_list(handle); }
    } const list{torch::stable::detail::to<StableListHandle>(value)};
    size_t size = 0;
    check(torch_list_size(list.handle, &size), "a list");
    List found;
    found.reserve(size);
    for (size_t i = 0; i < size; i++) {
        StableIValue element;
        check(torch_list_get_item(list.handle, i, &element), "a list");
        add(found, element);
    }
    return found;
}
template <>
struct Take<std::vector<Tensor>> {
    static std::vector<Tensor> from(StableIValue value) {
        return take_list<std::vector<Tensor>>(
            value, [](auto& list, StableIValue element) { list.push_back(Take<Tensor>::from(element)); });
    }
};
template <>
struct Take<Ints> {
    static Ints from(StableIValue value) {
        return take_list<Ints>(value, [](auto& list, StableIValue element) { list.push_back(int64_t(element)); });
    }
};

// A result for the stack, which then owns it.
template <class T>
StableIValue give(T&& value) {
    return torch::stable::detail::from(std::forward<T>(value));
}
inline StableIValue give(Tensor&& t) {
    AtenTensorHandle handle = t.release();
    if (handle == nullptr) check(aoti_torch_new_uninitialized_tensor(&handle), "an undefined tensor");
    return torch::stable::detail::from(handle);
}
inline StableIValue give(std::vector<Tensor>&& tensors) {
    StableListHandle list;
    check(torch_new_list_reserve_size(tensors.size(), &list), "a list");
    for (Tensor& t : tensors) check(torch_list_push_back(list, give(std::move(t))), "a list");
    return torch::stable::detail::from(list);
}

template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
    static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
        FR_CHECK(arguments == sizeof...(Parameters), "the schema has ", arguments, " arguments, the function ",
                 sizeof...(Parameters));
        call(stack, results, std::index_sequence_for<Parameters...>());
    }

  private:
    template <size_t... i>
    static void call(StableIValue* stack, uint64_t results, std::index_sequence<i...>) {
        std::tuple<HeldOf<Parameters>...> held{Take<HeldOf<Parameters>>::from(stack[i])...};
        if constexpr (std::is_void_v<Result>) function(std::get<i>(held)...);
        else put(stack, results, function(std::get<i>(held)...));
    }
    template <class... Parts>
    static void put(StableIValue* stack, uint64_t results, std::tuple<Parts...>&& found) {
        FR_CHECK(results == sizeof...(Parts), "the schema has ", results, " results, the function ", sizeof...(Parts));
        std::apply([&](auto&... part) { ((*stack++ = give(std::move(part))), ...); }, found);
    }
    template <class T>
    static void put(StableIValue* stack, uint64_t results, T&& found) {
        FR_CHECK(results == 1, "the schema has ", results, " results, the function one");
        *stack = give(std::move(found));
    }
};

}  // namespace fused_resnet
