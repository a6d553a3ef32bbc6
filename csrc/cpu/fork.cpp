// fork() while other threads draw random numbers.
//
// A child has only the thread that forked. If another thread held the mutex of the default generator, the child would
// wait for it for ever at its first use, and dynamo reads the generator's state whenever it captures. So the thread
// that forks holds the mutex during the fork. Source: POSIX, pthread_atfork, RATIONALE.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstring>

namespace {

// The mutex of the default generator, as far as it is known. PyTorch's stable ABI has no function for it. It is the
// first member of c10::GeneratorImpl, after the pointer to the virtual functions and one or two counts of references;
// behind it is a set of dispatch keys, which is not empty. Where nothing looks like that, no mutex is held.
pthread_mutex_t* find() {
    using Generator = char*;  // at::Generator holds the one pointer
    const auto generator =
        reinterpret_cast<const Generator& (*)()>(dlsym(RTLD_DEFAULT, "_ZN2at6detail22getDefaultCPUGeneratorEv"));
    if (generator == nullptr) return nullptr;
    static const pthread_mutex_t free = PTHREAD_MUTEX_INITIALIZER;
    static const char none[sizeof(void*)] = {};
    char* const start = generator();
    for (size_t words = 2; words <= 3; words++) {
        char* const place = start + words * sizeof(void*);
        if (std::memcmp(place, &free, sizeof free) == 0 && std::memcmp(place + sizeof free, none, sizeof none) != 0)
            return reinterpret_cast<pthread_mutex_t*>(place);
    }
    return nullptr;
}

// Found when the library is loaded, or, if a thread was drawing then, before a fork.
std::atomic<pthread_mutex_t*> known{find()};
// Of the thread that forks.
thread_local pthread_mutex_t* held = nullptr;

void hold() {
    if (known == nullptr) known = find();
    held = known;
    if (held != nullptr) pthread_mutex_lock(held);
}
void release() {
    if (held != nullptr) pthread_mutex_unlock(held);
}

[[maybe_unused]] const int registered = pthread_atfork(hold, release, release);

}  // namespace
