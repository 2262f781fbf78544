// Formats with a scale for a block of elements of a row, or for a whole row (E8M0: a byte E stands for 2^(E - 127), and 0
// for 0, as a state begins).
#pragma once
#include "elementwise.hpp"
#include "kernel.hpp"

namespace collage {
namespace {

// The number that a scale stands for, and what numbers are multiplied by to be divided by it.
inline F32 scale_from(uint8_t e) { return (F32)(U32{} + (uint32_t(e) << 23)); }
inline F32 inverse_scale(uint8_t e) { return (F32)(U32{} + (e == 254 ? 0x00400000 : (254u - e) << 23)); }

template <class Own, int per, class Places, class... C>
struct BlockwiseIn;

// `Own` has: number (of the words' lanes and the scale's), scale_of (a largest magnitude), and codes (of W numbers, with
// the inverse of their scale). Its planes hold the component types C, then the scales.
template <class Own, int per, class... C>
using Blockwise = BlockwiseIn<Own, per, std::index_sequence_for<C...>, C...>;

// The bits of the largest finite magnitude of so many elements, which fill whole chunks.
inline uint32_t largest_of(const float* x, int count) {
  U32 most{};
  for (int i = 0; i < count; i += W) {
    const F32 size = magnitude(load<F32>(x + i));
    most = larger(most, (U32)keep(finite(size), size));
  }
  return largest_of(most);
}

template <class Own, int per, size_t... P, class... C>
struct BlockwiseIn<Own, per, std::index_sequence<P...>, C...> {
  static constexpr int words = sizeof...(C), lanes = words + 1;
  static constexpr int block = per == PER_ROW ? STAGE : per;  // elements of a stage that share a scale
  static_assert(STAGE % block == 0, "blocks are never divided");

  static F32 visible(const Lanes<lanes>& x) { return x.x[0]; }
  static Mask moved(const Lanes<lanes>& from, const Lanes<lanes>& to) { return ((from.x[P] != to.x[P]) | ...); }

  static void values(PlanesAt planes, int count, Buffer& x) { values_of(planes, 0, count, x); }

  static void decode(PlanesAt planes, int count, Parted& x) {
    each_half(planes, 0, count, [&](int at, const Lanes<lanes>& own) {
      for (int p = 0; p < lanes; ++p) save(x[p] + at, own.x[p]);
    });
  }

  // Without random bits, to nearest.
  template <class>
  static void encode(PlanesAt planes, int count, const Parted& x, const uint32_t* random) {
    if constexpr (Own::format.stochastic)
      if (!random) return Own::Nearest::template encode<void>(planes, count, x, random);
    const auto bits = [&](int at) { return random ? load<U32>(random + at) : U32{}; };
    for (int first = 0; first < count; first += block)
      Own::encode_block(planes, first, padded(std::min(count, first + block)), x[0] + first, bits);
  }

 protected:
  using Base = BlockwiseIn;

  static void values_of(PlanesAt planes, int first, int end, Buffer& x) {
    each_half(planes, first, end, [&](int at, const Lanes<lanes>& own) { save(x + at, Own::number(own).x); });
  }

  // Numbers x of the elements from first to end. The scale of a row is given in its plane, those of blocks are decided here.
  template <class Bits>  // bits(at): random ones for the elements at and on
  static void encode_block(PlanesAt planes, int first, int end, const float* x, Bits bits) {
    char* const scale = planes[words] + first / block;
    if (per != PER_ROW) *scale = char(Own::scale_of(largest_of(x, end - first)));
    const F32 inverse = inverse_scale(*scale);
    const auto codes = [&](int at) { return Own::codes(load<F32>(x + at - first), bits(at), inverse); };
    for (int i = first; i < end; i += LANES) {
      const Lanes<words> even = codes(i), odd = codes(i + W);
      (C::write(planes[P], i, even.x[P], odd.x[P]), ...);
    }
  }

 private:
  template <class Fn>  // fn(where they lie in a buffer, lanes)
  static void each_half(PlanesAt planes, int first, int end, Fn fn) {
    for (int i = first; i < end; i += LANES) {
      const F32 scale = scale_from(planes[words][i / block]);
      fn(i, Lanes<lanes>{{C::template read<0>(planes[P], i)..., scale}});
      fn(i + W, Lanes<lanes>{{C::template read<1>(planes[P], i)..., scale}});
    }
  }
};

}  // namespace
}  // namespace collage
