// Work split over threads by elements. Threads live for one call: a pool would not survive fork() and would have to
// share the cores with torch's, while starting one costs about 20 microseconds.
#pragma once
#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace collage {

constexpr int64_t BLOCKS_PER_THREAD = 64;  // at least: less does not pay for a thread

// fn(first, end) on disjoint ranges that cover [0, blocks).
template <class Fn>
void parallel(int64_t blocks, int threads, Fn fn) {
  const int64_t parts = std::clamp<int64_t>(blocks / BLOCKS_PER_THREAD, 1, std::max(threads, 1));
  std::vector<std::thread> others;
  int64_t first = 0;
  for (int64_t k = 1; k < parts; ++k) {
    const int64_t end = blocks * k / parts;
    try {
      others.emplace_back(fn, first, end);
    } catch (const std::system_error&) {  // no more threads to be had: this one does the rest
      break;
    }
    first = end;
  }
  fn(first, blocks);
  for (std::thread& other : others) other.join();
}

}  // namespace collage
