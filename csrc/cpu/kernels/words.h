// Words: what products read at once, 32 bits. A float, or two bfloat16 where the processor multiplies these.
#pragma once

#include "vectors.h"

namespace {

// A word of elements T, a vector of words, and sum + a b with a and b of such vectors.
template <class T>
struct Word;
template <>
struct Word<float> {
    using type = float;
    using vector = F32;
    static FR_INLINE F32 add(F32 sum, F32 a, F32 b) { return sum + a * b; }
};
#ifdef FR_BF16
template <>
struct Word<bf16> {
    using type = uint32_t;
    using vector = U32;
    static FR_INLINE F32 add(F32 sum, U32 a, U32 b) {
        return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif
template <class T>
constexpr int64_t kWord = sizeof(uint32_t) / sizeof(T);
template <class T>
constexpr int64_t whole_words(int64_t depth) {
    return (depth + kWord<T> - 1) / kWord<T> * kWord<T>;
}

// What images of elements T are multiplied in.
template <class T>
struct Multiplied {
    using type = float;
};
#ifdef FR_BF16
template <>
struct Multiplied<bf16> {
    using type = bf16;
};
#endif

}  // namespace
