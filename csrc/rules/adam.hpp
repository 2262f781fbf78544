// Adam (Kingma, Ba 2015): the decay is part of the gradient. rules/adam.py.
#pragma once
#include "adamw.hpp"

namespace collage {
namespace {

struct Adam : OnTheta<3> {
  static constexpr const char* name = "adam";
  template <class N>
  using Constants = AdamConstants<N>;

  template <class N, class Then, class Theta, class M, class V>
  static void update(N raw, const Constants<N>& c, Then then, Theta theta, M momentum, V variance) {
    const N g = raw + c.w * theta.value();
    const auto m = momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g);
    const auto v = variance.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g));
    const N delta = -((c.a * m.value()) / (sqrt(v.value()) + c.e));
    then(delta, theta.grown(delta), m, v);
  }
};

// With the largest v so far (Reddi, Kale, Kumar 2018).
struct AdamAmsgrad : OnTheta<4> {
  static constexpr const char* name = "adam_amsgrad";
  template <class N>
  using Constants = AdamConstants<N>;

  template <class N, class Then, class Theta, class M, class V>
  static void update(N raw, const Constants<N>& c, Then then, Theta theta, M momentum, V variance, V maximum) {
    const N g = raw + c.w * theta.value();
    const auto m = momentum.scaled(c.beta1).grown(c.one_minus_beta1 * g);
    const auto v = variance.scaled(c.beta2).grown(c.one_minus_beta2 * (g * g));
    const auto top = maximum.raised(v);
    const N delta = -((c.a * m.value()) / (sqrt(top.value()) + c.e));
    then(delta, theta.grown(delta), m, v, top);
  }
};

}  // namespace
}  // namespace collage
