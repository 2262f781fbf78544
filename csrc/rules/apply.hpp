// Theta grows by an update that is given, and decays: rules/apply.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Apply : OnTheta<1> {
  static constexpr const char* name = "apply";

  template <class N>
  struct Constants {
    N lr, w;

    explicit Constants(Row<N> r) : lr(r), w(r) {}
  };

  template <class N, class Then, class Theta>
  static void update(N given, const Constants<N>& c, Then then, Theta theta) {
    const N delta = -(c.lr * given + c.w * theta.value());
    then(delta, theta.grown(delta));
  }
};

}  // namespace
}  // namespace collage
