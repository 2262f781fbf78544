// Lion (Chen et al. 2023), Algorithm 2: rules/lion.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Lion : OnTheta<2> {
  static constexpr const char* name = "lion";

  template <class N>
  struct Constants {
    Constant<N> beta1;
    N one_minus_beta1;
    Constant<N> beta2;
    N one_minus_beta2, lr, w;

    explicit Constants(Row<N> r)
        : beta1(r), one_minus_beta1(r), beta2(r), one_minus_beta2(r), lr(r), w(r) {}
  };

  template <class N, class Then, class Theta, class M>
  static void update(N g, const Constants<N>& c, Then then, Theta theta, M momentum) {
    const N u = sign(momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g).value());
    const N delta = -(c.lr * u + c.w * theta.value());
    const auto m = momentum.scaled(c.beta2).grown(c.one_minus_beta2 * g);
    then(delta, theta.grown(delta), m);
  }
};

}  // namespace
}  // namespace collage
