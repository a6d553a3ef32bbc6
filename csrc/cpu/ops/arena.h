// Memory for the results of a frozen row's steps, which later calls use again: the system gives new memory page by
// page, which for a batch of large images takes as long as the arithmetic.
#pragma once

#include "launch.h"

namespace fused_resnet::cpu {

class Arena {
    struct Part {
        char* begin;
        int64_t bytes;
    };
    std::vector<Part> free, used;  // of the block; `free` in the order of their places
    int64_t live = 0, wanted = 0;  // bytes of all results that are not dropped, and of the block that would hold them
    Part block;

  public:
    Arena();   // with a block that no other arena has
    ~Arena();  // which gives it back
    Arena(const Arena&) = delete;

    // An undefined tensor [N, C, H, W], channels_last: in the block, or, where there is no room, outside of it.
    Tensor result(IntList sizes, const Options& options);
    // Uses a result's memory again. Nothing for a tensor that is not in the block.
    void drop(const void* data);

    // Within it, results of operators that this thread calls are the arena's; null: they are tensors of their own.
    class Scope {
        Arena* before;

      public:
        explicit Scope(Arena* arena);
        ~Scope();
        Scope(const Scope&) = delete;
    };
};

// An undefined tensor [N, C, H, W], channels_last, for an operator's result.
Tensor result(IntList sizes, const Options& options);

}  // namespace fused_resnet::cpu
