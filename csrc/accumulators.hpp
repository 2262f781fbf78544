// Numbers that survive small increments: value, scaled(beta), grown(delta). One for one what accumulators.py says.
#pragma once
#include "arithmetic.hpp"

namespace collage {
namespace {

struct Parts {
  F32 hi, rest;  // the visible component, and what is left for the others, unrounded
};

template <class N>
struct Register {
  N x;

  N value() const { return x; }
  Register scaled(const Constant<N>& beta) const { return {x * beta.hi}; }
  Register grown(N delta) const { return {x + delta}; }
  Register raised(Register other) const {
    return {(other.x > x) | (other.x != other.x) ? other.x : x};  // a maximum that NaN passes through
  }

  template <class C>
  Parts parts() const {
    const F32 hi = C::rn(to_float(x));
    return {hi, to_float(x) - hi};
  }
};

// Two components of dtype C, or what grew from more: the visible one and the rest.
template <class C, int components>
struct Expanded;

// hi + lo in float32 arithmetic. Grows lo first: in one float32 sum the last component would see nothing.
template <class C>
struct Expanded<C, 2> {
  F32 hi, lo;

  F32 value() const { return lo + hi; }
  Register<F32> scaled(const Constant<F32>& beta) const { return Register<F32>{value()}.scaled(beta); }

  Expanded grown(F32 delta) const {
    const F32 r = lo + delta;
    const F32 h = C::rn(hi + r);
    return {h, (hi - h) + r};
  }

  template <class>
  Parts parts() const {
    return {hi, lo};
  }
};

template <class C>
struct Expanded<C, 3> {
  F32 hi, lo, lo2;

  F32 value() const { return (lo2 + lo) + hi; }
  Register<F32> scaled(const Constant<F32>& beta) const { return Register<F32>{value()}.scaled(beta); }
  Expanded<C, 2> grown(F32 delta) const { return Expanded<C, 2>{hi, lo}.grown(lo2 + delta); }
};

// hi + lo in bfloat16 arithmetic, as in the paper: rules read hi.
struct PaperExpanded {
  B16 hi, lo;

  B16 value() const { return hi; }

  PaperExpanded scaled(const Constant<B16>& beta) const {
    const Two<B16> r = mul(hi, lo, beta);
    return {r.sum, r.error};
  }

  PaperExpanded grown(B16 delta) const {
    const Two<B16> r = grow(hi, lo, delta);
    return {r.sum, r.error};
  }
};

// theta and the compensation of its next increment (Kahan 1965), in bfloat16 arithmetic.
struct Kahan {
  B16 hi, compensation;

  B16 value() const { return hi; }
  Kahan scaled(const Constant<B16>& beta) const { return {hi * beta.hi, compensation}; }

  Kahan grown(B16 delta) const {
    const B16 y = delta + compensation;
    const B16 s = hi + y;
    return {s, (hi - s) + y};
  }
};

// Which of the three a number in bfloat16 arithmetic is: known at run time, so that a rule is compiled once.
enum class Kind { one, expanded, kahan };

struct Paper {
  B16 hi, lo;
  Kind kind;

  B16 value() const { return hi; }

  Paper scaled(const Constant<B16>& beta) const {
    return on([&](const auto& x) { return x.scaled(beta); });
  }

  Paper grown(B16 delta) const {
    return on([&](const auto& x) { return x.grown(delta); });
  }

  Paper raised(const Paper& other) const {
    const Mask up = (other.hi.x > hi.x) | (other.hi.x != other.hi.x);
    return {{up ? other.hi.x : hi.x}, {up ? other.lo.x : lo.x}, kind};
  }

 private:
  template <class Fn>
  Paper on(Fn fn) const {
    if (kind == Kind::one) return {{fn(Register<B16>{hi}).x}, lo, kind};
    if (kind == Kind::kahan) {
      const Kahan x = fn(Kahan{hi, lo});
      return {x.hi, x.compensation, kind};
    }
    const PaperExpanded x = fn(PaperExpanded{hi, lo});
    return {x.hi, x.lo, kind};
  }
};

}  // namespace
}  // namespace collage
