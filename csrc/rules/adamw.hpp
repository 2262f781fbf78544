// AdamW (Loshchilov, Hutter 2019) as in Collage's Algorithm 2, with the paper's compact weight decay: rules/adamw.py.
#pragma once
#include "../accumulators.hpp"

namespace collage {
namespace {

struct AdamW {
  template <class N>
  struct Constants {
    Expansion<N> beta1;
    N one_minus_beta1;
    Expansion<N> beta2;
    N one_minus_beta2, a, e, w;

    explicit Constants(const float* row)
        : beta1{in_register<N>(splat(row[0])), in_register<N>(splat(row[1]))},
          one_minus_beta1(in_register<N>(splat(row[2]))),
          beta2{in_register<N>(splat(row[3])), in_register<N>(splat(row[4]))},
          one_minus_beta2(in_register<N>(splat(row[5]))),
          a(in_register<N>(splat(row[6]))),
          e(in_register<N>(splat(row[7]))),
          w(in_register<N>(splat(row[8]))) {}
  };

  // `then` is given the intended update and every slot's new number. (A continuation, because GCC keeps a returned
  // tuple of numbers in memory, which costs half of the speed.)
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
