#include "arena.h"

#include <algorithm>

namespace fused_resnet::cpu {

namespace {

constexpr int64_t kLine = 64;
// Calls after which a size that none of them needed is forgotten.
constexpr int64_t kRemembered = 64;

thread_local Arena* current = nullptr;

// The blocks that no arena has, and the size that the latest calls needed.
struct Blocks {
    std::mutex mutex;
    std::vector<std::pair<char*, int64_t>> idle;
    int64_t wanted = 0, recently = 0, calls = 0;
};
// Never destroyed: a thread may call a model while the process ends. A forked child's mutex may be held for ever by a
// thread that it does not have: who does not get it at once goes without a block.
Blocks& blocks() {
    static Blocks& all = *new Blocks;
    return all;
}

}  // namespace

Arena::Arena() : block{nullptr, 0} {
    Blocks& all = blocks();
    int64_t size = 0;
    if (std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock); lock) {
        size = all.wanted;
        if (!all.idle.empty()) {
            block = {all.idle.back().first, all.idle.back().second};
            all.idle.pop_back();
        }
    }
    if (block.bytes < size || block.bytes > 2 * size) {
        std::free(block.begin);
        block = {static_cast<char*>(size ? std::aligned_alloc(kLine, size) : nullptr), size};
        if (!block.begin) block.bytes = 0;
    }
    if (block.bytes) free.push_back(block);
}

Arena::~Arena() {
    Blocks& all = blocks();
    std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
    if (!lock) {
        std::free(block.begin);
        return;
    }
    all.wanted = std::max(all.wanted, wanted);
    all.recently = std::max(all.recently, wanted);
    if (++all.calls % kRemembered == 0) all.wanted = std::exchange(all.recently, 0);
    if (block.begin) all.idle.emplace_back(block.begin, block.bytes);
}

Tensor Arena::result(IntList sizes, const Options& options) {
    int64_t bytes = element_size(options.type);
    for (const int64_t n : sizes) bytes *= n;
    bytes = (bytes + kLine - 1) / kLine * kLine;
    live += bytes;
    wanted = std::max(wanted, live);
    auto best = free.end();
    for (auto part = free.begin(); part != free.end(); ++part)
        if (part->bytes >= bytes && (best == free.end() || part->bytes < best->bytes)) best = part;
    if (best == free.end() || bytes == 0) {
        if (live <= block.bytes) wanted = std::max(wanted, block.bytes + bytes);  // there is room, but in pieces
        used.push_back({nullptr, bytes});
        const Tensor outside = empty(sizes, options, kRows);
        used.back().begin = static_cast<char*>(outside.data_ptr());
        return outside;
    }
    used.push_back({best->begin, bytes});
    best->begin += bytes, best->bytes -= bytes;
    if (best->bytes == 0) free.erase(best);
    const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
    return from_memory(used.back().begin, sizes, {H * W * C, 1, W * C, C}, options.type);
}

void Arena::drop(const void* data) {
    const auto found = std::find_if(used.begin(), used.end(), [&](const Part& part) { return part.begin == data; });
    if (found == used.end()) return;
    const Part part = *found;
    used.erase(found);
    live -= part.bytes;
    if (part.begin < block.begin || part.begin >= block.begin + block.bytes) return;
    auto after = std::find_if(free.begin(), free.end(), [&](const Part& p) { return p.begin > part.begin; });
    after = free.insert(after, part);
    if (const auto next = after + 1; next != free.end() && after->begin + after->bytes == next->begin) {
        after->bytes += next->bytes;
        free.erase(next);
    }
    if (after != free.begin() && (after - 1)->begin + (after - 1)->bytes == after->begin) {
        (after - 1)->bytes += after->bytes;
        free.erase(after);
    }
}

Arena::Scope::Scope(Arena* arena) : before(std::exchange(current, arena)) {}
Arena::Scope::~Scope() { current = before; }

Tensor result(IntList sizes, const Options& options) {
    return current ? current->result(sizes, options) : empty(sizes, options, kRows);
}

}  // namespace fused_resnet::cpu
