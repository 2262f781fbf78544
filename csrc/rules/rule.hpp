// What every rule says of itself beside its name. Its numbers are those of the first `reads` slots; `then` is given the
// intended update of theta, and the new numbers of the first `writes` slots. (A continuation, because GCC keeps a
// returned tuple of numbers in memory, which costs half of the speed.)
#pragma once
#include "../accumulators.hpp"

namespace collage {
namespace {

// Slot 0 is theta, which grows by the intended update and is measured.
template <int slots>
struct UpdateOfTheta {
  static constexpr int reads = slots, writes = slots;
  static constexpr bool gradient = true, measured = true;
  static constexpr bool grows = true;  // slot 0 before it is scaled: it needs all of its components
};


}  // namespace
}  // namespace collage
