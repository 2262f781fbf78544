// A weight and an integer remainder: the number is one word, and the visible plane is how it shows: words.py.
#pragma once
#include "../blockwise.hpp"
#include "../elementwise.hpp"
#include "format.hpp"

namespace collage {
namespace {

using Int8 = Integer<int8_t>;
using Int16 = Integer<int16_t>;

// Where one of two elements' words differ. NaN does from itself.
template <class Own, int lanes>
inline Mask words_differ(const Lanes<lanes>& from, const Lanes<lanes>& to) {
  return (Own::visible(from) != Own::visible(to)) | ((Mask)from.x[1] != (Mask)to.x[1]);
}

// bf16 and the next bits of a float32: all of it, or cut to 24 bits, to nearest or stochastically.
template <class Lo, bool stochastic = false>
struct Cut : Elementwise<Cut<Lo, stochastic>, BF16, Lo> {
  using Nearest = Cut<Lo>;
  static constexpr int bits = 8 * Lo::BYTES;
  static constexpr Format format =
      described(BF16::name + "+" + Lo::name + suffix(stochastic), stochastic, 2, plane_of<BF16>, plane_of<Lo>);
  static constexpr Kind kind = Kind::one;

  static Register<F32> number(const Lanes<2>& x) { return {(F32)((U32)x.x[0] + ((U32)x.x[1] << (16 - bits)))}; }

  // hi is rounded half up in magnitude, and lo what it takes from there to the word.
  template <class Is>
  static Lanes<2> codes(const Register<F32>& number, U32 random, Is is_finite) {
    const U32 u = (U32)(is_finite() ? number.x : quiet(number.x));
    if constexpr (bits == 16) return {{(F32)(u + 0x8000), (F32)u}};
    U32 sum = u + (stochastic ? random >> 8 : 0x7F + ((u >> 8) & 1));
    if (stochastic && !is_finite()) {
      const Mask beyond = ((sum & 0x7FFFFF00) == 0x7F800000) & finite(number.x);
      sum += ((U32)beyond & 0xFFFFFF00);  // back from Inf
    }
    return {{(F32)(sum + 0x8000), (F32)(sum >> 8)}};
  }

  static F32 whole(const Register<F32>& number) {  // not finite where care is needed: from 2^127 on, too
    return stochastic ? number.x + number.x : number.x;
  }

  static Mask moved(const Lanes<2>& from, const Lanes<2>& to) { return words_differ<Cut>(from, to); }

  static Mask broken(const Lanes<2>& x) {
    const F32 hi = x.x[0];
    const Mask lo = (Mask)x.x[1], nan = hi != hi, inf = ~nan & ~finite(hi);
    return ((hi == F32{}) & (lo < 0)) | (inf & (lo > 0)) | (nan & (lo != 0));
  }
};

struct E4M3 {
  static constexpr Name name{"e4m3"};
  static constexpr int BYTES = 1, SIGNIFICAND = 3, EMIN = -6, MAX_CODE = 0x7E, INF_CODE = 0x7F, NAN_CODE = 0x7F;
};

// A narrow float followed by the bits of Lo, seen as the magnitude of one word.
template <class Hi, class Lo>
struct Wide {
  static constexpr int BITS = 8 * Lo::BYTES, FULL = Hi::SIGNIFICAND + BITS;  // significand bits, without the hidden one
  static constexpr int FIRST = 127 + Hi::EMIN;  // exponent field, in float32, of the smallest normal number
  static constexpr int MAGNITUDE = (1 << (8 * Hi::BYTES - 1)) - 1;
  static constexpr int TOP = ((FIRST - 1) << 23) + (Hi::MAX_CODE << (23 - Hi::SIGNIFICAND));  // float32, the largest that shows
  static constexpr int LARGEST = (Hi::MAX_CODE << BITS) + (1 << (BITS - 1)) - 1;

  // The number that both stand for, times a power of two.
  static F32 value(Mask hi, Mask lo, F32 scale) {
    const Mask code = hi & MAGNITUDE, word = (code << BITS) + lo;
    const F32 normal = (F32)((word + ((FIRST - 1) << FULL)) << (23 - FULL));
    const F32 x = (word >= 1 << FULL ? normal : converted(word) * power(Hi::EMIN - FULL)) * scale;
    return special(hi, hi < 0 ? -x : x);
  }

  static F32 visible(Mask hi) { return value(hi, Mask{}, splat(1.0f)); }

  // Rounded to nearest even, or stochastically. size: |x| over the scale.
  template <bool stochastic>
  static Lanes<2> codes(F32 x, F32 size, U32 random, Mask overflows) {
    const Mask word = smaller(code_of<FULL, Hi::EMIN, stochastic>((Mask)size, (Mask)random), LARGEST), nan = x != x;
    const Mask hi = (word + (1 << (BITS - 1))) >> BITS, code = overflows ? Mask{} + Hi::INF_CODE : hi;
    const Mask sign = ((Mask)x >> 31) & ~MAGNITUDE;
    return {{(F32)(nan ? Mask{} + Hi::NAN_CODE : code | sign), (F32)((word - (hi << BITS)) & ~(nan | overflows))}};
  }

  // The same codes of sizes up to the largest that shows; stochastically, only of 0 and normal numbers. To nearest, an
  // addition rounds them, to the ulp of a sum that is so many binades above.
  template <bool stochastic>
  static Lanes<2> usual_codes(F32 x, F32 size, U32 random) {
    constexpr int dropped = 23 - FULL;
    U32 word;  // of whatever else, anything: integers without a sign may overflow
    if constexpr (stochastic) {
      const U32 rounded = ((U32)size + (random >> (16 - dropped))) >> dropped;
      word = (rounded - ((FIRST - 1) << FULL)) & (U32)((U32)size != 0);
    } else {
      const U32 binade = (U32)larger((Mask)size & 0x7F800000, FIRST << 23), above = binade + (dropped << 23);
      word = (U32)(size + (F32)above) - above + (binade >> dropped) - (FIRST << FULL);
    }
    return {{(F32)(((word + (1 << (BITS - 1))) >> BITS) | ((U32)((Mask)x >> 31) & ~MAGNITUDE)), (F32)word}};
  }

  static Mask broken(Mask hi, Mask lo) {
    const Mask code = hi & MAGNITUDE;
    return ((code == 0) & (lo < 0)) | ((code > Hi::MAX_CODE) & (lo != 0));
  }

 private:
  static F32 special(Mask hi, F32 x) {
    const Mask code = hi & MAGNITUDE;
    const F32 nan = splat(__builtin_nanf("")), inf = hi < 0 ? splat(-__builtin_inff()) : splat(__builtin_inff());
    return code <= Hi::MAX_CODE ? x : code == Hi::INF_CODE && Hi::INF_CODE != Hi::NAN_CODE ? inf : nan;
  }
};

// fp16 and the next 8 bits.
template <class Lo, bool stochastic = false>
struct Word : Elementwise<Word<Lo, stochastic>, Int16, Lo> {
  using Nearest = Word<Lo>;
  using W16 = Wide<FP16, Lo>;
  static constexpr Format format =
      described(FP16::name + "+" + Lo::name + suffix(stochastic), stochastic, 2, plane_of<FP16>, plane_of<Lo>);
  static constexpr Kind kind = Kind::one;

  static Register<F32> number(const Lanes<2>& x) { return {W16::value((Mask)x.x[0], (Mask)x.x[1], splat(1.0f))}; }
  static F32 visible(const Lanes<2>& x) { return W16::visible((Mask)x.x[0]); }

  template <class Is>
  static Lanes<2> codes(const Register<F32>& number, U32 random, Is) {
    const F32 size = magnitude(number.x);
    return W16::template codes<stochastic>(number.x, size, random, size >= 65520.0f);  // what goes to Inf to nearest
  }

  static F32 whole(const Register<F32>&) { return F32{}; }  // the codes look at all

  static Mask moved(const Lanes<2>& from, const Lanes<2>& to) { return words_differ<Word>(from, to); }
  static Mask broken(const Lanes<2>& x) { return W16::broken((Mask)x.x[0], (Mask)x.x[1]); }
};

// e4m3 and the next bits, times one power of two for a row: the smallest with which its largest number is in range.
template <class Lo, bool stochastic = false>
struct ScaledWord : Blockwise<ScaledWord<Lo, stochastic>, E8M0, PER_ROW, Int8, Lo> {
  using Nearest = ScaledWord<Lo>;
  using W8 = Wide<E4M3, Lo>;
  static constexpr Format format = described(E4M3::name + "+" + Lo::name + suffix(stochastic), stochastic, 3,
                                             plane_of<Int8>, plane_of<Lo>, {1, PER_ROW});
  static constexpr Kind kind = Kind::one;
  static constexpr int LEAST = 26;   // scale with which the smallest word is a normal float32
  static constexpr int TRIED = 128;  // elements that are encoded as if they were usual, until they turn out not to be

  static Register<F32> number(const Lanes<3>& x) { return {W8::value((Mask)x.x[0], (Mask)x.x[1], x.x[2])}; }
  static F32 visible(const Lanes<3>& x) { return W8::value((Mask)x.x[0], Mask{}, x.x[2]); }

  static uint8_t scale_of(uint32_t largest) {
    return uint8_t(std::clamp(int(largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000), LEAST, 246));
  }

  static Lanes<2> codes(F32 x, U32 random, uint8_t scale) {
    const F32 size = magnitude(x);
    return W8::template codes<stochastic>(x, size * E8M0::inverse(scale), random, size == __builtin_inff());
  }

  template <class Bits>
  static void encode_block(PlanesAt planes, int first, int end, const float* x, Bits bits) {
    for (int i = first; i < end; i += TRIED)
      if (const int stop = std::min(end, i + TRIED); !encode_usual(planes, i, stop, x + i - first, bits))
        ScaledWord::Base::encode_block(planes, i, stop, x + i - first, bits);
  }

  static Mask moved(const Lanes<3>& from, const Lanes<3>& to) {  // not by a scale alone, under which words differ
    return number(from).x != number(to).x;
  }

  static Mask broken(const Lanes<3>& x) { return W8::broken((Mask)x.x[0], (Mask)x.x[1]); }

  // A part of a row in a loop that decodes it, under a usual scale, which goes into the constant.
  class OfRow {
   public:
    static bool fits(PlanesAt planes) { return scale_in(planes) >= LEAST && scale_in(planes) <= 255 - W8::FIRST; }

    explicit OfRow(PlanesAt planes) : factor_((F32)(U32{} + ((scale_in(planes) + W8::FIRST - 1) << 23))) {}

    // The word's bits are those of a float32 whose exponents begin elsewhere.
    template <int half>
    Register<F32> read(PlanesAt planes, int i) {
      const Mask hi = (Mask)Int8::template read<half>(planes[0], i), lo = (Mask)Lo::template read<half>(planes[1], i);
      const Mask word = ((hi & W8::MAGNITUDE) << W8::BITS) + lo;
      most_ = larger(most_, (U32)word);
      const F32 size = (F32)(word << (23 - W8::FULL)) * factor_;
      return {(F32)((U32)size | ((U32)hi & 0x80000000))};
    }

    // Whatever they hold.
    template <int half>
    static Register<F32> careful(PlanesAt planes, int i) {
      return number({{Int8::template read<half>(planes[0], i), Lo::template read<half>(planes[1], i),
                      E8M0::number(uint8_t(scale_in(planes)))}});
    }

    bool usual() const { return collage::largest_of(most_) <= uint32_t(W8::LARGEST); }  // neither NaN nor broken was read

   private:
    static uint32_t scale_in(PlanesAt planes) { return uint8_t(planes[2][0]); }

    F32 factor_;
    U32 most_{};
  };

 private:
  // Whether they were: if not, what is written is of no use.
  template <class Bits>
  static bool encode_usual(PlanesAt planes, int first, int end, const float* x, Bits bits) {
    const F32 inverse = E8M0::inverse(ScaledWord::scale_at(planes, first));
    U32 most{}, least = ~U32{};  // of sizes, and of what is not 0
    const auto codes = [&](int at) {
      const F32 number = load<F32>(x + at - first), size = magnitude(number) * inverse;
      most = larger(most, (U32)size);
      if (stochastic) least = min_unsigned(least, (U32)size - 1);
      return W8::template usual_codes<stochastic>(number, size, bits(at));
    };
    for (int i = first; i < end; i += LANES) {
      const Lanes<2> even = codes(i), odd = codes(i + W);
      Int8::write(planes[0], i, even.x[0], odd.x[0]);
      Lo::write(planes[1], i, even.x[1], odd.x[1]);
    }
    return all((Mask)((most <= uint32_t(W8::TOP)) & (least >= uint32_t(W8::FIRST << 23) - 1)));
  }
};

// What a word with 16 more bits shows, and the float32 master weight that it is cut from: the number is that alone.
struct ScaledMaster : Blockwise<ScaledMaster, E8M0, PER_ROW, Int8, FP32> {
  using W8 = Wide<E4M3, Int16>;
  static constexpr Format format =
      described(E4M3::name + "+fp32", false, 3, plane_of<Int8>, plane_of<FP32>, {1, PER_ROW});
  static constexpr Kind kind = Kind::one;

  static Register<F32> number(const Lanes<3>& x) { return {x.x[1]}; }
  static F32 visible(const Lanes<3>& x) { return W8::value((Mask)x.x[0], Mask{}, x.x[2]); }
  static uint8_t scale_of(uint32_t largest) { return ScaledWord<Int16>::scale_of(largest); }

  static Lanes<2> codes(F32 x, U32, uint8_t scale) { return {{shown(x, E8M0::inverse(scale)), x}}; }

  static Mask moved(const Lanes<3>& from, const Lanes<3>& to) { return from.x[1] != to.x[1]; }

  static Mask broken(const Lanes<3>& x) {
    const F32 hi = W8::visible((Mask)x.x[0]), cast = W8::visible((Mask)shown(x.x[1], E8M0::inverse_of(x.x[2])));
    return ~((hi == cast) | ((hi != hi) & (cast != cast)));
  }

 private:
  static F32 shown(F32 x, F32 inverse) {
    const F32 size = magnitude(x);
    return W8::codes<false>(x, size * inverse, U32{}, size == __builtin_inff()).x[0];
  }
};

}  // namespace
}  // namespace collage
