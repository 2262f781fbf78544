// The component dtypes: how LANES of them lie in memory, and rounding to them. In between they are float32
// lanes, in two halves: the elements at even places (half 0) and those at odd ones (half 1).
#pragma once
#include "simd.hpp"

#if defined(__AVX512BW__)
#define COLLAGE_SHUFFLE(a, b, k)                                                                               \
  __builtin_shufflevector(a, b, k(0), k(1), k(2), k(3), k(4), k(5), k(6), k(7), k(8), k(9), k(10), k(11), k(12), \
                          k(13), k(14), k(15))
#elif defined(__AVX2__)
#define COLLAGE_SHUFFLE(a, b, k) __builtin_shufflevector(a, b, k(0), k(1), k(2), k(3), k(4), k(5), k(6), k(7))
#else
#define COLLAGE_SHUFFLE(a, b, k) __builtin_shufflevector(a, b, k(0), k(1), k(2), k(3))
#endif

namespace collage {
namespace {

// Text that is put together when the kernels are compiled.
struct Name {
  char text[16]{};

  constexpr Name(const char* from) { append(from); }
  constexpr Name operator+(const Name& other) const {
    Name both = *this;
    both.append(other.text);
    return both;
  }

 private:
  constexpr void append(const char* from) {
    int k = 0;
    while (text[k]) ++k;
    while (*from) text[k++] = *from++;
  }
};

// Every NaN made the quiet one.
inline F32 quiet(F32 x) { return x == x ? x : (F32)(U32{} + 0x7FC00000); }

// Where the elements of a half stand among those of two vectors in order, and the other way round.
template <int half>
constexpr int place(int k) {
  return 2 * k + half;
}

template <int first>
constexpr int merged(int k) {
  return first + k / 2 + (k % 2 ? W : 0);
}

struct FP32 {
  static constexpr Name name{"fp32"};
  static constexpr int BYTES = 4;

  template <int half>
  static F32 read(const char* plane, int64_t i) {
    const F32 a = load<F32>(plane + 4 * i), b = load<F32>(plane + 4 * (i + W));
    return quiet(COLLAGE_SHUFFLE(a, b, place<half>));
  }

  static void write(char* plane, int64_t i, F32 even, F32 odd) {
    save(plane + 4 * i, COLLAGE_SHUFFLE(even, odd, merged<0>));
    save(plane + 4 * (i + W), COLLAGE_SHUFFLE(even, odd, merged<W / 2>));
  }

  static F32 code(F32 x) { return x; }
  static F32 rn(F32 x) { return x; }
};

struct BF16 {
  static constexpr Name name{"bf16"};
  static constexpr int BYTES = 2;
  static constexpr float ULP = 0x1p-7f, LEAST_NORMAL = 0x1p-126f, LEAST = 0x1p-133f;

  template <int half>
  static F32 read(const char* plane, int64_t i) {
    const U32 words = load<U32>(plane + 2 * i);
    return (F32)(half ? words & 0xFFFF0000 : words << 16);
  }

  static void write(char* plane, int64_t i, F32 even, F32 odd) {
    save(plane + 2 * i, blend_high((U32)even >> 16, (U32)odd));
  }

  // The number of a code: 16 bits in the high half of a lane, and anything in the low half.
  static F32 value(F32 code) { return (F32)((U32)code & 0xFFFF0000); }

  // To nearest, ties to even. Half an ulp less one, plus the last kept bit, carries into the kept bits exactly when
  // rounding goes up; a carry out of the significand is the next binade, or Inf. NaN stays NaN, because no NaN here has
  // a low half that carries: they come from a bf16, from `FP32::read`, or from the processor.
  static F32 code(F32 x) {
    const U32 bits = (U32)x;
    return (F32)(bits + 0x7FFF + ((bits >> 16) & 1));
  }

  static F32 rn(F32 x) { return value(code(x)); }

  // Stochastically, for finite |x| < 2^127: 16 random bits are added to the 16 that are dropped.
  static F32 stochastic_code(F32 x, U32 random) { return (F32)((U32)x + random); }

  // For any finite x. Stops before Inf.
  static F32 careful_stochastic_code(F32 x, U32 random) {
    const U32 below = min_signed((U32)x + random, U32{} + 0x7F7FFFFF);  // the sign bit makes negative ones smaller
    return (F32)min_unsigned(below, U32{} + 0xFF7FFFFF);
  }
};

// The code that a magnitude rounds to in a float of so many significand bits without the hidden one: to nearest even, or
// stochastically. Codes have no end: who calls this has to set one. `shift` bits are dropped, and as many random ones are
// added to them first; where they are more than the 16 that there are, half of the last of these goes with them, so that
// it stays unbiased.
template <int significand_bits, int emin, bool stochastic>
inline Mask code_of(Mask magnitude, Mask random) {
  constexpr int least = 127 + emin;  // exponent field, in float32, of the smallest normal number
  const Mask exponent = larger(magnitude >> 23, 1);
  const Mask dropped = 23 - significand_bits + larger(least - exponent, 0), shift = smaller(dropped, 30);
  const Mask whole = (magnitude & 0x7FFFFF) | (magnitude < 0x800000 ? Mask{} : Mask{} + 0x800000);
  const Mask significand = whole >> smaller(dropped - shift, 31);  // rounding reaches no further down
  const Mask one = Mask{} + 1, more = larger(shift - 16, 0);
  const Mask stretched = more > 0 ? (random << more) + ((one << more) >> 1) : random >> larger(16 - shift, 0);
  const Mask added = stochastic ? stretched : (one << (shift - 1)) - 1 + ((significand >> shift) & 1);
  return ((significand + added) >> shift) + (larger(exponent - least, 0) << significand_bits);
}

struct FP16 {
  static constexpr Name name{"fp16"};
  static constexpr int BYTES = 2, SIGNIFICAND = 10, EMIN = -14, MAX_CODE = 0x7BFF, INF_CODE = 0x7C00, NAN_CODE = 0x7E00;
  static constexpr float ULP = 0x1p-10f, LEAST_NORMAL = 0x1p-14f, LEAST = 0x1p-24f;

#ifdef COLLAGE_HALVES
  template <int half>
  static F32 read(const char* plane, int64_t i) {
    const F32 a = from_halves(load<U16>(plane + 2 * i)), b = from_halves(load<U16>(plane + 2 * (i + W)));
    return quiet(COLLAGE_SHUFFLE(a, b, place<half>));
  }

  static void write(char* plane, int64_t i, F32 even, F32 odd) {
    save(plane + 2 * i, to_halves(COLLAGE_SHUFFLE(even, odd, merged<0>)));
    save(plane + 2 * (i + W), to_halves(COLLAGE_SHUFFLE(even, odd, merged<W / 2>)));
  }

  static F32 rn(F32 x) { return from_halves(to_halves(x)); }
#else
  template <int half>
  static F32 read(const char* plane, int64_t i) {
    const U32 words = load<U32>(plane + 2 * i);
    return decode(half ? words >> 16 : words & 0xFFFF);
  }

  static void write(char* plane, int64_t i, F32 even, F32 odd) {
    save(plane + 2 * i, encode(even) | (encode(odd) << 16));
  }

  static F32 rn(F32 x) { return decode(encode(x)); }
#endif
  static F32 code(F32 x) { return x; }  // `write` rounds

  static F32 stochastic_code(F32 x, U32 random) {  // for finite x
    const Mask code = code_of<SIGNIFICAND, EMIN, true>((Mask)magnitude(x), (Mask)random);
    return with_sign_of(x, widened((U32)smaller(code, MAX_CODE)));
  }
  static F32 careful_stochastic_code(F32 x, U32 random) { return stochastic_code(x, random); }

 private:
  // Of a finite magnitude. The exponent is moved to float32's by an exact multiplication: subnormals too.
  static F32 widened(U32 code) { return (F32)(code << 13) * 0x1p112f; }

  static F32 with_sign_of(F32 x, F32 y) { return (F32)((U32)y | ((U32)x & 0x80000000)); }

  static F32 decode(U32 code) {
    const U32 magnitude = code & 0x7FFF;
    const F32 x = magnitude >= 0x7C00 ? (F32)((magnitude << 13) | 0x7F800000) : widened(magnitude);
    return quiet(with_sign_of((F32)(code << 16), x));
  }

  // As BF16::code; below the smallest normal number, adding 1/2, whose ulp is the smallest subnormal, rounds.
  static U32 encode(F32 x) {
    const U32 bits = (U32)x, magnitude = bits & 0x7FFFFFFF;
    const U32 normal = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3F000000;
    U32 code = (F32)magnitude < 0x1p-14f ? subnormal : normal;
    code = (Mask)code > 0x7BFF ? U32{} + 0x7C00 : code;
    return x == x ? code | ((bits >> 16) & 0x8000) : U32{} + 0x7E00;
  }
};

template <int step>
constexpr int turned(int k) {
  return (k + step) % W;
}

template <int step = W / 2>
inline uint32_t largest_of(U32 x) {
  if constexpr (step == 0)
    return x[0];
  else
    return largest_of<step / 2>(larger(x, COLLAGE_SHUFFLE(x, x, turned<step>)));
}

#undef COLLAGE_SHUFFLE

// Integers, in the bits of a lane.
template <class T>
struct Integer {
  static constexpr bool SIGNED = T(-1) < T(0);
  static_assert(SIGNED || sizeof(T) == 1);
  static constexpr Name name{sizeof(T) == 2 ? "int16" : SIGNED ? "int8" : "uint8"};
  static constexpr int BYTES = sizeof(T);

  template <int half>
  static F32 read(const char* plane, int64_t i) {
    const Mask pairs = BYTES == 2 ? load<Mask>(plane + 2 * i) : SIGNED ? signed_words(plane + i) : wide_words(plane + i);
    constexpr int bits = 8 * BYTES, above = 32 - bits;
    if constexpr (half) return (F32)(pairs >> bits);
    return SIGNED ? (F32)((pairs << above) >> above) : (F32)(pairs & 0xFF);
  }

  static void write(char* plane, int64_t i, F32 even, F32 odd) {
    if constexpr (BYTES == 2)
      save(plane + 2 * i, blend_high((U32)even, (U32)odd << 16));
    else
      save_words(plane + i, ((U32)even & 0xFF) | ((U32)odd << 8));
  }

  // The high halves of `even` and `odd`: a sign and a size.
  static void write_high(char* plane, int64_t i, Mask even, Mask odd) {
    Words k = (Words)blend_high((U32)even >> 16, (U32)odd);
    if constexpr (SIGNED) {
      const Words sign = k >> 15;
      k = ((k & 0x7FFF) ^ sign) - sign;
    }
    save(plane + i, __builtin_convertvector(k, Bytes));
  }

  // Whether some of so many elements, in whole chunks, are that.
  static bool any(const char* plane, int count, T value) {
    Bytes found{};
    for (int i = 0; i < count; i += LANES) found |= (Bytes)(load<Bytes>(plane + i) == uint8_t(value));
    return some(found);
  }
};

}  // namespace
}  // namespace collage
