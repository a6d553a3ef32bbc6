// fork() while other threads draw random numbers.
#include <ATen/CPUGeneratorImpl.h>

#ifndef _WIN32
#include <pthread.h>

namespace {

std::mutex& generator_mutex() {
    at::Generator generator = at::detail::getDefaultCPUGenerator();  // a handle; the generator lives for ever
    return generator.mutex();
}

// A child has only the thread that forked. If another thread held the mutex of the default generator, the child would
// wait for it for ever at its first use, and dynamo reads the generator's state whenever it captures. So the thread
// that forks holds the mutex during the fork. Source: POSIX, pthread_atfork, RATIONALE.
[[maybe_unused]] const int registered = pthread_atfork(
    [] { generator_mutex().lock(); }, [] { generator_mutex().unlock(); }, [] { generator_mutex().unlock(); });

}  // namespace
#endif
