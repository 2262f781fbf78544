// AdamW (Loshchilov, Hutter 2019) as in Collage's Algorithm 2, with the paper's compact weight decay: rules/adamw.py.
#pragma once
#include "../accumulators.hpp"
#include "rule.hpp"

namespace collage {
namespace {

struct AdamW {
  static constexpr Request::Rule rule = Request::adamw;

  template <class N>
  struct Constants {
    Expansion<N> beta1;
    N one_minus_beta1;
    Expansion<N> beta2;
    N one_minus_beta2, a, e, w;

    explicit Constants(const float* row)
        : beta1{constant<N>(row[0]), constant<N>(row[1])},
          one_minus_beta1(constant<N>(row[2])),
          beta2{constant<N>(row[3]), constant<N>(row[4])},
          one_minus_beta2(constant<N>(row[5])),
          a(constant<N>(row[6])),
          e(constant<N>(row[7])),
          w(constant<N>(row[8])) {}
  };

  template <class N, class Theta, class M, class V, class Then>
  static auto update(N g, const Constants<N>& c, Theta theta, M momentum, V variance, Then then) {
    const auto m = momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g);
    const auto v = variance.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g));
    const N delta = -((c.a * m.value()) / (sqrt(v.value()) + c.e) + c.w * theta.value());
    return then(delta, theta.grown(delta), m, v);
  }
};

}  // namespace
}  // namespace collage
