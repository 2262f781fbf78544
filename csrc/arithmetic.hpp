// The two arithmetics. A rule is written once over either: F32, where every operation rounds once to float32, and B16,
// where every operation is computed in float32 and rounded once to bfloat16, which is the correctly rounded operation.
#pragma once
#include <type_traits>

#include "components.hpp"

namespace collage {
namespace {

struct B16 {
  F32 x;
};

inline B16 operator+(B16 a, B16 b) { return {BF16::rn(a.x + b.x)}; }
inline B16 operator-(B16 a, B16 b) { return {BF16::rn(a.x - b.x)}; }
inline B16 operator*(B16 a, B16 b) { return {BF16::rn(a.x * b.x)}; }
inline B16 operator/(B16 a, B16 b) { return {BF16::rn(a.x / b.x)}; }
inline B16 operator-(B16 a) { return {-a.x}; }
inline B16 sqrt(B16 a) { return {BF16::rn(sqrt(a.x))}; }

// 1 or -1; x itself where it is +-0 or NaN.
inline F32 sign(F32 x) { return (x < F32{}) | (x > F32{}) ? (F32)(((U32)x & 0x80000000) | 0x3F800000) : x; }
inline B16 sign(B16 x) { return {sign(x.x)}; }

inline F32 to_float(F32 x) { return x; }
inline F32 to_float(B16 x) { return x.x; }

// A float32 rounded to the arithmetic's registers.
template <class N>
inline N in_register(F32 x) {
  if constexpr (std::is_same_v<N, F32>)
    return x;
  else
    return {BF16::rn(x)};
}

// A constant, as an expansion in the arithmetic's dtype: (hi, lo) in bfloat16, where beta2 = 0.999 would be 1.0.
template <class N>
struct Constant {
  N hi, lo;
};

// A rule's folded constants, read one after the other.
template <class N>
class Row {
 public:
  explicit Row(const float* next) : next_(next) {}
  operator N() { return in_register<N>(splat(*next_++)); }
  operator Constant<N>() {
    const N hi = *this, lo = *this;
    return {hi, lo};
  }

 private:
  const float* next_;
};

template <class N>
struct Two {
  N sum, error;
};

// s + e == a + b exactly (Knuth; mcf.two_sum).
inline Two<B16> two_sum(B16 a, B16 b) {
  const B16 s = a + b;
  const B16 b_virtual = s - a;
  return {s, (a - (s - b_virtual)) + (b - b_virtual)};
}

// p + e == a * b exactly; the float32 product is exact, so no fma is needed (mcf.two_prod).
inline Two<B16> two_prod(B16 a, B16 b) {
  const B16 p = a * b;
  return {p, {BF16::rn(a.x * b.x - p.x)}};
}

// Collage, Algorithm 1 (mcf.grow).
inline Two<B16> grow(B16 hi, B16 lo, B16 a) {
  const Two<B16> head = two_sum(hi, a);
  return two_sum(head.sum, lo + head.error);
}

// An expansion times a constant (mcf.mul).
inline Two<B16> mul(B16 hi, B16 lo, Constant<B16> c) {
  const Two<B16> head = two_prod(hi, c.hi);
  return two_sum(head.sum, (hi * c.lo + lo * c.hi) + head.error);
}

}  // namespace
}  // namespace collage
