// AdamW (Loshchilov, Hutter 2019) as in Collage's Algorithm 2, with the paper's compact weight decay: rules/adamw.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

template <class N>
struct AdamConstants {
  Constant<N> beta1;
  N one_minus_beta1;
  Constant<N> beta2;
  N one_minus_beta2, a, e, w;

  explicit AdamConstants(Row<N> r)
      : beta1(r), one_minus_beta1(r), beta2(r), one_minus_beta2(r), a(r), e(r), w(r) {}
};

struct AdamW : OnTheta<3> {
  static constexpr const char* name = "adamw";
  template <class N>
  using Constants = AdamConstants<N>;

  template <class N, class Then, class Theta, class M, class V>
  static void update(N g, const Constants<N>& c, Then then, Theta theta, M momentum, V variance) {
    const auto m = momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g);
    const auto v = variance.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g));
    const N delta = -((c.a * m.value()) / (sqrt(v.value()) + c.e) + c.w * theta.value());
    then(delta, theta.grown(delta), m, v);
  }
};

// With the largest v so far (Reddi, Kale, Kumar 2018).
struct AdamWAmsgrad : OnTheta<4> {
  static constexpr const char* name = "adamw_amsgrad";
  template <class N>
  using Constants = AdamConstants<N>;

  template <class N, class Then, class Theta, class M, class V>
  static void update(N g, const Constants<N>& c, Then then, Theta theta, M momentum, V variance, V maximum) {
    const auto m = momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g);
    const auto v = variance.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g));
    const auto top = maximum.raised(v);
    const N delta = -((c.a * m.value()) / (sqrt(top.value()) + c.e) + c.w * theta.value());
    then(delta, theta.grown(delta), m, v, top);
  }
};

}  // namespace
}  // namespace collage
