// Numbers that survive small increments: value, scaled(beta), grown(delta). One for one what accumulators.py says.
#pragma once
#include "arithmetic.hpp"

namespace collage {
namespace {

struct Parts {
  F32 hi, rest;  // the visible component, and what is left for the other, unrounded
};

template <class N>
struct Register {
  N x;

  N value() const { return x; }
  Register scaled(const Expansion<N>& beta) const { return {x * beta.hi}; }
  Register grown(N delta) const { return {x + delta}; }

  Parts parts() const {
    const F32 hi = BF16::rn(to_float(x));
    return {hi, to_float(x) - hi};
  }
};

// hi + lo in float32 arithmetic. Grows lo first: in one float32 sum the last component would see nothing.
struct Expanded {
  F32 hi, lo;

  F32 value() const { return lo + hi; }
  Register<F32> scaled(const Expansion<F32>& beta) const { return Register<F32>{value()}.scaled(beta); }

  Expanded grown(F32 delta) const {
    const F32 r = lo + delta;
    const F32 h = BF16::rn(hi + r);
    return {h, (hi - h) + r};
  }

  Parts parts() const { return {hi, lo}; }
};

// hi + lo in bfloat16 arithmetic, as in the paper: rules read hi.
struct PaperExpanded {
  B16 hi, lo;

  B16 value() const { return hi; }

  PaperExpanded scaled(const Expansion<B16>& beta) const {
    const Two<B16> r = mul(hi, lo, beta);
    return {r.sum, r.error};
  }

  PaperExpanded grown(B16 delta) const {
    const Two<B16> r = grow(hi, lo, delta);
    return {r.sum, r.error};
  }

  Parts parts() const { return {hi.x, lo.x}; }
};

// theta and the compensation of its next increment (Kahan 1965), in bfloat16 arithmetic.
struct Kahan {
  B16 hi, compensation;

  B16 value() const { return hi; }
  Kahan scaled(const Expansion<B16>& beta) const { return {hi * beta.hi, compensation}; }

  Kahan grown(B16 delta) const {
    const B16 y = delta + compensation;
    const B16 s = hi + y;
    return {s, (hi - s) + y};
  }

  Parts parts() const { return {hi.x, compensation.x}; }
};

}  // namespace
}  // namespace collage
