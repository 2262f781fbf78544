// Work split over threads by elements.
#pragma once
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace collage {

constexpr int64_t BLOCKS_PER_THREAD = 64;  // at least: less does not pay for a thread

// Threads do not live on in a forked process; OpenMP's would be waited for in vain.
inline bool forked() {
  static std::atomic<bool> child{false};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { child = true; });
  return registered == 0 && child;
}

// GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are there already. New ones would have to
// share the cores with them, because they spin for milliseconds after each of torch's operations. Null: none is found.
using Team = void (*)(void (*run)(void*), void* argument, unsigned threads, unsigned flags);
inline Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked() ? nullptr : found;
}

// fn(first, end) on disjoint ranges that cover [0, blocks), by as many threads as can be had.
template <class Fn>
void parallel(int64_t blocks, int threads, Fn fn) {
  const int64_t parts = std::clamp<int64_t>(blocks / BLOCKS_PER_THREAD, 1, std::max(threads, 1));
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t k; (k = next++) < parts;) fn(blocks * k / parts, blocks * (k + 1) / parts);
  };
  if (parts == 1) return work();
  if (team()) return team()([](void* argument) { (*static_cast<decltype(work)*>(argument))(); }, &work, unsigned(parts), 0);
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < parts) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: these do it all
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace collage
