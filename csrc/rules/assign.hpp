// Theta becomes a number that is given: rules/assign.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Assign : OnSlots<1, 1> {
  static constexpr const char* name = "assign";
  static constexpr bool measured = true;
  template <class N>
  using Constants = Weight<N>;

  template <class N, class Then, class Theta>
  static void update(N given, const Constants<N>& c, Then then, Theta theta) {
    const N number = c.weight * given;
    then(number - theta.value(), Register<N>{number});
  }
};

}  // namespace
}  // namespace collage
