// A moving average of gradients, and the direction it gives, which is only written: rules/momentum.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

template <class N>
struct MomentumConstants {
  Constant<N> momentum;
  N one_minus_momentum;

  explicit MomentumConstants(Row<N> r) : momentum(r), one_minus_momentum(r) {}
};

struct Momentum : OnSlots<1, 2> {
  static constexpr const char* name = "momentum";
  template <class N>
  using Constants = MomentumConstants<N>;

  template <class N, class Then, class B>
  static void update(N g, const Constants<N>& c, Then then, B buffer) {
    const auto b = buffer.scaled(c.momentum).grown(c.one_minus_momentum * g);
    then(g, b, Register<N>{b.value()});
  }
};

struct MomentumNesterov : OnSlots<1, 2> {
  static constexpr const char* name = "momentum_nesterov";
  template <class N>
  using Constants = MomentumConstants<N>;

  template <class N, class Then, class B>
  static void update(N g, const Constants<N>& c, Then then, B buffer) {
    const auto b = buffer.scaled(c.momentum).grown(c.one_minus_momentum * g);
    then(g, b, Register<N>{c.one_minus_momentum * g + b.scaled(c.momentum).value()});
  }
};

}  // namespace
}  // namespace collage
