// A weight average follows theta, which is only read: rules/average.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Average : OnSlots<2, 1> {
  static constexpr const char* name = "average";
  static constexpr bool gradient = false, grows = true;
  template <class N>
  using Constants = Weight<N>;

  template <class N, class Then, class A, class Theta>
  static void update(N none, const Constants<N>& c, Then then, A average, Theta theta) {
    then(none, average.grown(c.weight * (theta.value() - average.value())));
  }
};

}  // namespace
}  // namespace collage
