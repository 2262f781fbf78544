// A sum of gradients: rules/accumulate.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Accumulate : OnSlots<1, 1> {
  static constexpr const char* name = "accumulate";
  static constexpr bool grows = true;
  template <class N>
  using Constants = Weight<N>;

  template <class N, class Then, class A>
  static void update(N g, const Constants<N>& c, Then then, A accumulated) {
    then(g, accumulated.grown(c.weight * g));
  }
};

}  // namespace
}  // namespace collage
