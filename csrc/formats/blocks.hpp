// Moments in 8 bits: a code per element, and a power of two for every block of elements of a row: blocks.py.
#pragma once
#include "../blockwise.hpp"
#include "format.hpp"

namespace collage {
namespace {

// Code k stands for a piecewise linear k^(2^N), which is a shift of k's bits as a float; below 2^N it is linear.
template <class Code, bool stochastic = false>
struct Companded : Blockwise<Companded<Code, stochastic>, 128, Code> {
  using Nearest = Companded<Code>;
  static constexpr Format format =
      described(Code::name + "/128" + suffix(stochastic), stochastic, 2, plane_of<Code>, {1, 128});
  static constexpr Kind kind = Kind::one;

  static constexpr bool SIGNED = Code::SIGNED;
  static constexpr int N = SIGNED ? 2 : 3;
  static constexpr int TOP = SIGNED ? 127 : 254, NOT_A_NUMBER = SIGNED ? -128 : 255;
  static constexpr int LIMIT = SIGNED ? 0x780000 : 0x700000;  // the value of TOP: bits below the exponent
  static constexpr int LINEAR = SIGNED ? -19 : -39;           // exponent of the value of code 2^N
  static constexpr int LEAST = SIGNED ? 22 : 43;              // scale with which the smallest code is a normal float32
  static constexpr int I0 = (127 + N) << 23, J0 = (127 + LINEAR) << 23;

  static Register<F32> number(const Lanes<2>& x) {
    const Mask code = (Mask)x.x[0];
    const F32 k = magnitude(converted(code));
    const F32 companded = (F32)((((Mask)k - I0) << N) + J0);
    const F32 size = ((Mask)k >= I0 ? companded : k * power(LINEAR - N)) * x.x[1];
    const F32 value = code < 0 ? -size : size;
    return {code == NOT_A_NUMBER ? splat(__builtin_nanf("")) : value};
  }

  static uint8_t scale_of(uint32_t largest) {
    return uint8_t(std::clamp(int(largest >> 23) + ((largest & 0x7FFFFF) > LIMIT), LEAST, 254));
  }

  static Lanes<1> codes(F32 x, U32 random, F32 inverse) {
    const F32 y = magnitude(x) * inverse;
    const Mask companded = (((Mask)y - J0 + (1 << (N - 1))) >> N) + I0;
    const F32 code = (Mask)y >= J0 ? (F32)companded : y * power(N - LINEAR);
    const Mask fixed = nearest(keep(finite(x), code) * 65536.0f);  // 16 bits of fraction
    const Mask added = stochastic ? (Mask)random : 0x7FFF + ((fixed >> 16) & 1);
    const Mask k = smaller((fixed + added) >> 16, TOP);
    const Mask own = SIGNED ? (x < 0.0f ? -k : k) : (x > 0.0f ? larger(k, 1) : k);  // a second moment stays above 0
    return {{(F32)(finite(x) & (SIGNED | (x >= 0.0f)) ? own : Mask{} + NOT_A_NUMBER)}};
  }

  static Mask broken(const Lanes<2>&) { return Mask{}; }
};

}  // namespace
}  // namespace collage
