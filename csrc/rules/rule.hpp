// What every rule says of itself beside its name. It is given the numbers of the first `reads` slots, and `then` the
// intended update of theta and the new numbers of the first `writes` slots. (A continuation, because GCC keeps a
// returned tuple of numbers in memory, which costs half of the speed.)
#pragma once
#include "../accumulators.hpp"

namespace collage {
namespace {

template <int read, int written>
struct OnSlots {
  static constexpr int reads = read, writes = written;
  static constexpr bool gradient = true;   // whether one is read
  static constexpr bool grows = false;     // slot 0 grows as it is stored, not scaled: it needs all of its components
  static constexpr bool measured = false;  // slot 0 is theta: what becomes of its intended update can be summed
};

template <int slots>
struct OnTheta : OnSlots<slots, slots> {
  static constexpr bool grows = true, measured = true;
};

// The weight of what is added, and nothing else.
template <class N>
struct Weight {
  N weight;

  explicit Weight(Row<N> r) : weight(r) {}
};

}  // namespace
}  // namespace collage
