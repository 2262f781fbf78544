// Planes in memory <-> numbers in registers. One for one what formats.py says: `encode` is pure, only the walk writes.
#pragma once
#include "accumulators.hpp"
#include "random.hpp"

namespace collage {
namespace {

// One element's planes, as codes: what `write` stores. A format with one plane leaves lo alone.
struct Planes {
  F32 hi, lo;
};

// Whether every number to be stored is finite, as nearly all are. If not, `encode` also looks at NaN and Inf.
template <bool v>
using Finite = std::bool_constant<v>;

template <class C, bool stochastic, bool is_finite>
inline F32 rounded(F32 x, U32 word, int slot, Finite<is_finite>) {
  if constexpr (C::component != Code::bf16 || (is_finite && !stochastic)) {
    return C::code(x);
  } else if constexpr (is_finite) {
    return C::stochastic_code(x, bits_of(word, slot));
  } else {
    const F32 nearest = C::code(quiet(x));
    if constexpr (!stochastic) return nearest;
    return finite(x) ? C::stochastic_code(x, bits_of(word, slot)) : nearest;
  }
}

// One plane: fp32, bf16, fp16.
template <class C, bool stochastic = false>
struct Single {
  static constexpr Code code{Code::single, C::component, stochastic};
  static constexpr bool random = stochastic;

  template <int half>
  Planes read(const char* const* p, int64_t i) const {
    return {C::template read<half>(p[0], i), F32{}};
  }

  void write(char* const* p, int64_t i, const Planes& even, const Planes& odd) const {
    C::write(p[0], i, even.hi, odd.hi);
  }

  template <class N>
  Register<N> number(const Planes& x) const {
    return {x.hi};
  }

  template <class A, class Is>
  Planes encode(const A& number, U32 word, int slot, Is is_finite) const {
    return {rounded<C, stochastic>(to_float(number.value()), word, slot, is_finite), F32{}};
  }

  template <class A>
  F32 whole(const A& number) const {
    return to_float(number.value());
  }

  template <int part>
  F64 difference(const Planes& from, const Planes& to) const {
    return wide<part>(to.hi) - wide<part>(from.hi);
  }
  Planes values(const Planes& codes) const { return {C::value(codes.hi), F32{}}; }
  Mask moved(const Planes& from, const Planes& to) const { return from.hi != to.hi; }
  Mask broken(const Planes&) const { return Mask{}; }
};

// Planes that no `encode` could have left: |lo| beyond half an ulp of hi (for Kahan: a whole one) and one step more.
// To nearest, hi is 0 only for what lo, too, rounds to 0.
template <bool stochastic>
inline Mask broken_pair(const Planes& x, float ulps) {
  const F32 binade = (F32)((U32)x.hi & 0x7F800000);
  const F32 bound = (binade > 0x1p-126f ? binade : splat(0x1p-126f)) * (ulps * 0x1p-7f);
  const F32 step = bound * 0x1p-7f;
  const F32 limit = bound + (step > 0x1p-133f ? step : splat(0x1p-133f));
  const F32 lo = (F32)((U32)x.lo & 0x7FFFFFFF);
  const Mask paired = stochastic ? finite(x.hi) : finite(x.hi) & (x.hi != F32{});
  return ~(paired ? lo <= limit : x.lo == F32{});
}

// A bfloat16 plane and a second one.
template <class Second>
struct TwoPlanes {
  template <int half>
  Planes read(const char* const* p, int64_t i) const {
    return {BF16::read<half>(p[0], i), Second::template read<half>(p[1], i)};
  }

  void write(char* const* p, int64_t i, const Planes& even, const Planes& odd) const {
    BF16::write(p[0], i, even.hi, odd.hi);
    Second::write(p[1], i, even.lo, odd.lo);
  }

  Planes values(const Planes& codes) const { return {BF16::value(codes.hi), Second::value(codes.lo)}; }
  Mask moved(const Planes& from, const Planes& to) const { return (from.hi != to.hi) | (from.lo != to.lo); }
};

// hi + lo, both bfloat16. hi = RN(x), lo = R(x - hi), and lo = +0 where either is not finite.
template <bool stochastic = false>
struct Pair : TwoPlanes<BF16> {
  static constexpr Code code{Code::pair, Code::bf16, stochastic};
  static constexpr bool random = stochastic;

  template <class N>
  auto number(const Planes& x) const {
    if constexpr (std::is_same_v<N, F32>)
      return Expanded{x.hi, x.lo};
    else
      return PaperExpanded{{x.hi}, {x.lo}};
  }

  template <class A, class Is>
  Planes encode(const A& number, U32 word, int slot, Is is_finite) const {
    const Parts x = number.parts();
    if constexpr (is_finite) return {x.hi, rounded<BF16, stochastic>(x.rest, word, slot, is_finite)};
    const F32 rest = keep(finite(x.hi + x.rest), x.rest);
    return {quiet(x.hi), rounded<BF16, stochastic>(rest, word, slot, is_finite)};
  }

  template <class A>
  F32 whole(const A& number) const {
    const Parts x = number.parts();
    return x.hi + x.rest;
  }

  Mask broken(const Planes& x) const { return broken_pair<stochastic>(x, 0.5f); }

  template <int part>
  F64 difference(const Planes& from, const Planes& to) const {  // last component first
    return (wide<part>(to.lo) - wide<part>(from.lo)) + (wide<part>(to.hi) - wide<part>(from.hi));
  }
};

// bf16 for the forward pass, and the float32 master weight that it is a cast of. The number is the master alone.
struct Master : TwoPlanes<FP32> {
  static constexpr Code code{Code::master, Code::bf16, false};
  static constexpr bool random = false;

  template <class N>
  Register<N> number(const Planes& x) const {
    return {x.lo};
  }

  template <class A, class Is>
  Planes encode(const A& number, U32 word, int slot, Is is_finite) const {
    const F32 x = to_float(number.value());
    return {rounded<BF16, false>(x, word, slot, is_finite), x};
  }

  template <class A>
  F32 whole(const A& number) const {
    return to_float(number.value());
  }

  Mask broken(const Planes& x) const {
    const F32 cast = BF16::rn(x.lo);
    return ~((x.hi == cast) | ((x.hi != x.hi) & (cast != cast)));
  }

  template <int part>
  F64 difference(const Planes& from, const Planes& to) const {
    return wide<part>(to.lo) - wide<part>(from.lo);
  }
};

// bf16 with Kahan's compensation in a second bf16 plane.
struct Compensated : Pair<> {
  static constexpr Code code{Code::compensated, Code::bf16, false};

  Mask broken(const Planes& x) const { return broken_pair<false>(x, 1.0f); }

  template <class N>
  Kahan number(const Planes& x) const {
    return {{x.hi}, {x.lo}};
  }
};

}  // namespace
}  // namespace collage
