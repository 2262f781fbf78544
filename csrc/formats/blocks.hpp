// Moments in 8 bits: a code per element, and a power of two for every block of elements of a row: blocks.py.
#pragma once
#include "../blockwise.hpp"
#include "format.hpp"

namespace collage {
namespace {

// Code k stands for a piecewise linear k^(2^N), which is a shift of k's bits as a float; below 2^N it is linear.
template <class Code, bool stochastic = false>
struct Companded : Blockwise<Companded<Code, stochastic>, E8M0, 128, Code> {
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

  static Lanes<1> codes(F32 x, U32 random, uint8_t scale) {
    const F32 y = magnitude(x) * E8M0::inverse(scale);
    const Mask companded = (((Mask)y - J0 + (1 << (N - 1))) >> N) + I0;
    const F32 code = (Mask)y >= J0 ? (F32)companded : y * power(N - LINEAR);
    const Mask fixed = nearest(keep(finite(x), code) * 65536.0f);  // 16 bits of fraction
    const Mask added = stochastic ? (Mask)random : 0x7FFF + ((fixed >> 16) & 1);
    const Mask k = smaller((fixed + added) >> 16, TOP);
    const Mask own = SIGNED ? (x < 0.0f ? -k : k) : (x > 0.0f ? larger(k, 1) : k);  // a second moment stays above 0
    return {{(F32)(finite(x) & (SIGNED | (x >= 0.0f)) ? own : Mask{} + NOT_A_NUMBER)}};
  }

  static Mask broken(const Lanes<2>&) { return Mask{}; }

  static void values(PlanesAt planes, int count, Buffer& x) {
    for (int first = 0; first < count; first += Companded::block) {
      const int end = padded(std::min(count, first + Companded::block));
      if (!Decoder::fits(planes, first) || Code::any(planes[0] + first, end - first, NOT_A_NUMBER)) {
        Companded::values_of(planes, first, end, x);
        continue;
      }
      const Decoder decoder(planes, first);
      for (int i = first; i < end; i += LANES) {
        save(x + i, decoder.template value<0>(planes, i));
        save(x + i + W, decoder.template value<1>(planes, i));
      }
    }
  }

  template <class Bits>
  static void encode_block(PlanesAt planes, int first, int end, const float* x, Bits bits) {
    U32 most{};
    for (int i = 0; i < end - first; i += W) most = larger(most, size_of(load<F32>(x + i)));
    const uint32_t largest = largest_of(most);
    const uint8_t e = scale_of(largest);
    if (!Encoder::fits(largest, e)) return Companded::Base::encode_block(planes, first, end, x, bits);
    Companded::scale_at(planes, first) = e;
    const Encoder encoder(e);
    for (int i = first; i < end; i += LANES) {
      const F32 even = load<F32>(x + i - first), odd = load<F32>(x + i - first + W);
      Code::write_high(planes[0], i, encoder(even, bits(i)), encoder(odd, bits(i + W)));
    }
  }

  // Bits that are larger where the magnitude is; and beyond Inf what has no code.
  static U32 size_of(F32 x) { return SIGNED ? (U32)magnitude(x) : (U32)x; }

  // The same numbers, of a block without NaN and with a scale that an encoder left, which goes into the constants.
  class Decoder {
   public:
    static bool fits(PlanesAt planes, int first) {
      const uint8_t e = Companded::scale_at(planes, first);
      return e >= LEAST && e < 255;
    }

    Decoder(PlanesAt planes, int first) {
      const uint32_t e = Companded::scale_at(planes, first);
      const uint32_t base = J0 + ((e - 127) << 23) - (uint32_t(I0) << N);
      base_ = U32{} + base;
      zero_ = (F32)(U32{} + ((0 - base) >> N));  // below 2: what companded is 0
      linear_ = (F32)(U32{} + ((e + LINEAR - N) << 23));
    }

    template <int half>
    F32 value(PlanesAt planes, int i) const {
      const F32 k = converted((Mask)Code::template read<half>(planes[0], i)), size = SIGNED ? magnitude(k) : k;
      const F32 companded = (F32)(((U32)larger(size, zero_) << N) + base_);
      const F32 value = larger(companded, size * linear_);
      return SIGNED ? (F32)((U32)value | ((U32)k & 0x80000000)) : value;
    }

   private:
    U32 base_;
    F32 zero_, linear_;
  };

  // The same codes, of finite numbers with a usual scale.
  class Encoder {
   public:
    static bool fits(uint32_t largest, uint8_t e) { return largest < 0x7F800000 && e < 254 && (e >= LOWEST || !largest); }

    Encoder() = default;
    explicit Encoder(uint8_t scale) {
      const int e = std::max<int>(scale, LOWEST);
      base_ = Mask{} + int((127 - e) * (1 << 23) - J0 + (1 << (N - 1)));
      linear_ = (F32)(Mask{} + ((254 - e + N - LINEAR + 16) << 23));
    }

    // The code in the high halves, and below what decided on rounding.
    Mask operator()(F32 x, U32 random) const {
      const F32 size = SIGNED ? magnitude(x) : x;
      const F32 companded = (F32)((((Mask)size + base_) >> N) + (I0 + (16 << 23)));
      const Mask fixed = nearest(smaller(companded, size * linear_));
      const Mask k = fixed + (stochastic ? (Mask)random : 0x7FFF + ((fixed >> 16) & 1));
      return SIGNED ? (Mask)((U32)k | ((U32)x & 0x80000000)) : larger(k, (Mask)(x != F32{}) & 0x10000);
    }

   private:
    static constexpr int LOWEST = N - LINEAR + 16;  // the scale from which on the factor is a float32

    Mask base_;
    F32 linear_;
  };

  // A block in a loop that decodes it, and encodes its new numbers once all of them are there.
  class OfBlock : public Decoder {
   public:
    using Decoder::Decoder;

    template <int half>
    Register<F32> read(PlanesAt planes, int i) {
      if (half == 0) unknown_ |= (Bytes)(load<Bytes>(planes[0] + i) == uint8_t(NOT_A_NUMBER));
      return {Decoder::template value<half>(planes, i)};
    }

    void count(F32 x) { most_ = larger(most_, size_of(x)); }

    // Whether every code that was read has a number.
    bool all_known() const { return !some(unknown_); }

    // The scale of the numbers that were counted.
    void decide(PlanesAt planes, int first) {
      const uint32_t largest = largest_of(most_);
      const uint8_t e = scale_of(largest);
      fits_ = Encoder::fits(largest, e);
      if (fits_) Companded::scale_at(planes, first) = e;
      encoder_ = Encoder(e);
    }

    Lanes<1> codes(F32 x, U32 random) const { return {{(F32)encoder_(x, random)}}; }

    void write(PlanesAt planes, int i, const Lanes<1>& even, const Lanes<1>& odd) const {
      if (fits_) Code::write_high(planes[0], i, (Mask)even.x[0], (Mask)odd.x[0]);
    }

    template <class Bits>
    void finish(PlanesAt planes, int first, int end, const float* x, Bits bits) const {
      if (!fits_) Companded::Base::encode_block(planes, first, end, x, bits);
    }

   private:
    U32 most_{};
    Bytes unknown_{};
    Encoder encoder_;
    bool fits_;
  };
};

}  // namespace
}  // namespace collage
