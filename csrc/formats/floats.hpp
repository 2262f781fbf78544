// Formats made of floats: one, an expansion of several, a float32 master weight, Kahan's compensation.
#pragma once
#include "../elementwise.hpp"
#include "format.hpp"

namespace collage {
namespace {

// One plane: fp32, bf16, fp16.
template <class C, bool stochastic = false>
struct Single : Elementwise<Single<C, stochastic>, C> {
  using Nearest = Single<C>;
  static constexpr Format format = described(C::name + suffix(stochastic), stochastic, 1, plane_of<C>);
  static constexpr Kind kind = Kind::one;

  static Register<F32> number(const Lanes<1>& x) { return {x.x[0]}; }

  template <class Is>
  static Lanes<1> codes(const Register<F32>& number, U32 random, Is is_finite) {
    return {{rounded<C, stochastic>(number.x, random, is_finite)}};
  }

  static F32 whole(const Register<F32>& number) {  // not finite where care is needed: from 2^127 on, too
    return stochastic ? number.x + number.x : number.x;
  }

  static Mask broken(const Lanes<1>&) { return Mask{}; }
};

// Components that no `encode` could have left: |lo| beyond half an ulp of hi (for Kahan: a whole one) and one step
// more. To nearest, hi is 0 only for what lo, too, rounds to 0.
template <class C, bool stochastic>
inline Mask broken_pair(F32 hi, F32 lo, float ulps) {
  const F32 binade = (F32)((U32)hi & 0x7F800000);
  const F32 bound = (binade > C::LEAST_NORMAL ? binade : splat(C::LEAST_NORMAL)) * (ulps * C::ULP);
  const F32 step = bound * C::ULP;
  const F32 limit = bound + (step > C::LEAST ? step : splat(C::LEAST));
  const Mask paired = stochastic ? finite(hi) : finite(hi) & (hi != F32{});
  return ~(paired ? magnitude(lo) <= limit : lo == F32{});
}

template <class Own, class C, int components>
using ComponentsOf = std::conditional_t<components == 2, Elementwise<Own, C, C>, Elementwise<Own, C, C, C>>;

// hi + lo (+ lo2), all of one dtype: each is RN of the rest, the last one R of it. +0 below what is not finite.
template <class C, int components = 2, bool stochastic = false>
struct Expansion : ComponentsOf<Expansion<C, components, stochastic>, C, components> {
  using Nearest = Expansion<C, components>;
  using Component = C;
  using Every = Lanes<components>;
  static constexpr Format format =
      described(C::name + (components == 2 ? "x2" : "x3") + suffix(stochastic), stochastic, components, plane_of<C>,
                plane_of<C>, components == 2 ? Plane{} : plane_of<C>);
  static constexpr Kind kind = Kind::expanded;

  static Expanded<C, components> number(const Every& x) {
    if constexpr (components == 2)
      return {x.x[0], x.x[1]};
    else
      return {x.x[0], x.x[1], x.x[2]};
  }

  template <class Number, class Is>
  static Every codes(const Number& number, U32 random, Is is_finite) {
    const Parts x = number.template parts<C>();
    const F32 hi = is_finite() ? x.hi : quiet(x.hi);
    const F32 rest = is_finite() ? x.rest : keep(finite(x.hi + x.rest), x.rest);
    if constexpr (components == 2) {
      return {{hi, rounded<C, stochastic>(rest, random, is_finite)}};
    } else {
      const F32 lo = C::rn(rest);
      return {{hi, lo, rounded<C, stochastic>(rest - lo, random, is_finite)}};
    }
  }

  // The rest is not finite, either, where hi is not; and where both are, so is their sum.
  template <class Number>
  static F32 whole(const Number& number) {
    return number.template parts<C>().rest;
  }

  static Mask broken(const Every& x) {
    const Mask second = broken_pair<C, stochastic && components == 2>(x.x[0], x.x[1], 0.5f);
    if constexpr (components == 2)
      return second;
    else
      return second | broken_pair<C, stochastic>(x.x[1], x.x[2], 0.5f);
  }
};

// A narrow plane for the forward pass, and the float32 master weight that it is a cast of: the number is that alone.
template <class C>
struct Master : Elementwise<Master<C>, C, FP32> {
  static constexpr Format format = described(C::name + "+fp32", false, 2, plane_of<C>, plane_of<FP32>);
  static constexpr Kind kind = Kind::one;

  static Register<F32> number(const Lanes<2>& x) { return {x.x[1]}; }

  template <class Is>
  static Lanes<2> codes(const Register<F32>& number, U32, Is is_finite) {
    return {{rounded<C, false>(number.x, U32{}, is_finite), number.x}};
  }

  static F32 whole(const Register<F32>& number) { return number.x; }

  static Mask broken(const Lanes<2>& x) {
    const F32 cast = C::rn(x.x[1]);
    return ~((x.x[0] == cast) | ((x.x[0] != x.x[0]) & (cast != cast)));
  }
};

// bf16 with Kahan's compensation in a second bf16 plane.
struct Compensated : Expansion<BF16> {
  static constexpr Format format = described("bf16+kahan", false, 2, plane_of<BF16>, plane_of<BF16>);
  static constexpr Kind kind = Kind::kahan;

  static Mask broken(const Lanes<2>& x) { return broken_pair<BF16, false>(x.x[0], x.x[1], 1.0f); }
};

}  // namespace
}  // namespace collage
