// Stochastic gradient descent; with momentum (Polyak 1964), and Nesterov's: rules/sgd.py.
#pragma once
#include "rule.hpp"

namespace collage {
namespace {

struct Sgd : OnTheta<1> {
  static constexpr const char* name = "sgd";

  template <class N>
  struct Constants {
    N lr, w;

    explicit Constants(Row<N> r) : lr(r), w(r) {}
  };

  template <class N, class Then, class Theta>
  static void update(N g, const Constants<N>& c, Then then, Theta theta) {
    const N delta = -(c.lr * (g + c.w * theta.value()));
    then(delta, theta.grown(delta));
  }
};

template <class N>
struct SgdConstants {
  Constant<N> momentum;
  N gain, lr, w;

  explicit SgdConstants(Row<N> r) : momentum(r), gain(r), lr(r), w(r) {}
};

struct SgdMomentum : OnTheta<2> {
  static constexpr const char* name = "sgd_momentum";
  template <class N>
  using Constants = SgdConstants<N>;

  template <class N, class Then, class Theta, class B>
  static void update(N g, const Constants<N>& c, Then then, Theta theta, B buffer) {
    const N d = g + c.w * theta.value();
    const auto b = buffer.scaled(c.momentum).grown(c.gain * d);
    const N delta = -(c.lr * b.value());
    then(delta, theta.grown(delta), b);
  }
};

struct SgdNesterov : OnTheta<2> {
  static constexpr const char* name = "sgd_nesterov";
  template <class N>
  using Constants = SgdConstants<N>;

  template <class N, class Then, class Theta, class B>
  static void update(N g, const Constants<N>& c, Then then, Theta theta, B buffer) {
    const N d = g + c.w * theta.value();
    const auto b = buffer.scaled(c.momentum).grown(c.gain * d);
    const N delta = -(c.lr * (d + b.scaled(c.momentum).value()));
    then(delta, theta.grown(delta), b);
  }
};

}  // namespace
}  // namespace collage
