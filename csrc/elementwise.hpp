// Formats that hold every element by itself, block by block: decoded into float32 numbers in cache, and encoded from
// them. Between the two, numbers lie as the lanes hold them: of every chunk first those at even places.
#pragma once
#include <cstddef>
#include <type_traits>
#include <utility>

#include "accumulators.hpp"

namespace collage {
namespace {

constexpr int STAGE = 512;  // elements that are decoded, computed and encoded at a time: what stays in the first cache
constexpr int MAX_PARTS = 3;

using Buffer = float[STAGE];
using Parted = Buffer[MAX_PARTS];  // the components of numbers; or the parts of new ones
using PlanesAt = char* const*;     // of one slot, where the elements lie

// A format's planes of W elements, as numbers.
template <int planes>
struct Lanes {
  F32 x[planes];
};

template <class F>
inline Lanes<F::lanes> lanes_at(const Parted& x, int i) {
  Lanes<F::lanes> lanes;
  for (int p = 0; p < F::lanes; ++p) lanes.x[p] = load<F32>(x[p] + i);
  return lanes;
}

// Zero in the lanes that only fill the last chunk: they count for nothing.
inline void clear_padding(Buffer& x, int count) {
  for (int i = count; i < padded(count); ++i) x[place_of(i)] = 0.0f;
}

// Whether every number to be stored is finite, as nearly all are. If not, `codes` also looks at NaN and Inf.
template <bool v>
using Finite = std::bool_constant<v>;

template <class C, bool stochastic, bool is_finite>
inline F32 rounded(F32 x, U32 random, Finite<is_finite>) {
  if constexpr (is_finite) {
    if constexpr (stochastic)
      return C::stochastic_code(x, random);
    else
      return C::code(x);
  } else {
    const F32 nearest = C::code(quiet(x));
    if constexpr (stochastic)
      return finite(x) ? C::careful_stochastic_code(x, random) : nearest;
    else
      return nearest;
  }
}

// What a rule makes a number of, out of the buffers; and how a new one gets there.
template <class Number>
struct Held;

template <>
struct Held<Register<F32>> {
  static Register<F32> load(const Parted& x, int i) { return {collage::load<F32>(x[0] + i)}; }
};

template <class C>
struct Held<Expanded<C, 2>> {
  static Expanded<C, 2> load(const Parted& x, int i) {
    return {collage::load<F32>(x[0] + i), collage::load<F32>(x[1] + i)};
  }
};

template <class C>
struct Held<Expanded<C, 3>> {
  static Expanded<C, 3> load(const Parted& x, int i) {
    return {collage::load<F32>(x[0] + i), collage::load<F32>(x[1] + i), collage::load<F32>(x[2] + i)};
  }
};

inline void hold(const Register<F32>& number, Parted& x, int i) { save(x[0] + i, number.x); }

template <class C>
inline void hold(const Expanded<C, 2>& number, Parted& x, int i) {
  save(x[0] + i, number.hi);
  save(x[1] + i, number.lo);
}

inline void hold(const Register<B16>& number, Parted& x, int i) { save(x[0] + i, number.x.x); }

inline void hold(const Paper& number, Parted& x, int i) {
  save(x[0] + i, number.hi.x);
  save(x[1] + i, number.lo.x);
}

template <class Own, class Places, class... C>
struct ElementwiseIn;

// `Own` has, for W elements: number, codes, whole and broken. Its planes hold the component types C.
template <class Own, class... C>
using Elementwise = ElementwiseIn<Own, std::index_sequence_for<C...>, C...>;

template <class Own, size_t... P, class... C>
struct ElementwiseIn<Own, std::index_sequence<P...>, C...> {
  using Every = Lanes<sizeof...(C)>;
  static constexpr int lanes = sizeof...(C), words = lanes;

  template <int half>
  static Every read(PlanesAt planes, int i) {
    return {{C::template read<half>(planes[P], i)...}};
  }

  static void write(PlanesAt planes, int i, const Every& even, const Every& odd) {
    (C::write(planes[P], i, even.x[P], odd.x[P]), ...);
  }

  static F32 visible(const Every& x) { return x.x[0]; }
  static Mask moved(const Every& from, const Every& to) { return ((from.x[P] != to.x[P]) | ...); }

  // What rules read.
  static void values(PlanesAt planes, int count, Buffer& x) {
    each_half(count, [&](int i, int at, auto half) { save(x + at, Own::number(read<half()>(planes, i)).value()); });
  }

  // Every plane, as numbers.
  static void decode(PlanesAt planes, int count, Parted& x) {
    each_half(count, [&](int i, int at, auto half) {
      const Every lanes = read<half()>(planes, i);
      (save(x[P] + at, lanes.x[P]), ...);
    });
  }

  // Of registers x[0] are the numbers; of others x[0] and x[1] are their parts. Without random bits, to nearest.
  template <class Number>
  static void encode(PlanesAt planes, int count, const Parted& x, const uint32_t* random) {
    if constexpr (Own::format.stochastic)
      if (!random) return Own::Nearest::template encode<Number>(planes, count, x, random);
    if (!store<Number, true>(planes, count, x, random)) store<Number, false>(planes, count, x, random);
  }

 private:
  template <class Number, bool is_finite>
  static bool store(PlanesAt planes, int count, const Parted& x, const uint32_t* random) {
    F32 whole{};
    const auto encoded = [&](int at) {
      const Number number = Held<Number>::load(x, at);
      whole += Own::whole(number);
      return Own::codes(number, Own::format.stochastic ? load<U32>(random + at) : U32{}, Finite<is_finite>{});
    };
    for (int i = 0; i < count; i += LANES) {
      const Every even = encoded(i);
      write(planes, i, even, encoded(i + W));
    }
    return all_finite(whole);
  }

  template <class Fn>  // fn(elements i and on, where they lie in a buffer, half)
  static void each_half(int count, Fn fn) {
    for (int i = 0; i < count; i += LANES) {
      fn(i, i, std::integral_constant<int, 0>{});
      fn(i, i + W, std::integral_constant<int, 1>{});
    }
  }
};

}  // namespace
}  // namespace collage
