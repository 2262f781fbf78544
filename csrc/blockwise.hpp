// Formats with a scale for a block of elements of a row, or for a whole row.
#pragma once
#include "elementwise.hpp"
#include "kernel.hpp"

namespace collage {
namespace {

// A byte E stands for 2^(E - 127), and 0 for 0, as a state begins.
struct E8M0 {
  using Word = uint8_t;
  static F32 number(uint8_t e) { return (F32)(U32{} + (uint32_t(e) << 23)); }
  static F32 inverse(uint8_t e) { return (F32)(U32{} + (e == 254 ? 0x00400000 : (254u - e) << 23)); }
  static F32 inverse_of(F32 number) {  // the same
    const U32 bits = (U32)number, last = U32{} + (254u << 23);
    return (F32)(bits == last ? U32{} + 0x00400000 : last - bits);
  }
};

template <class Own, class Scale, int per, class Places, class... C>
struct BlockwiseIn;

// `Own` has: number (of the words' lanes and of their scale as a number), scale_of (the bits of a largest magnitude), codes
// (of W numbers and their scale) and broken. Its planes hold the component types C, then the scales.
template <class Own, class Scale, int per, class... C>
using Blockwise = BlockwiseIn<Own, Scale, per, std::index_sequence_for<C...>, C...>;

// The bits of the largest finite magnitude of so many elements, which fill whole chunks.
inline uint32_t largest_of(const float* x, int count) {
  U32 most{};
  for (int i = 0; i < count; i += W) {
    const F32 size = magnitude(load<F32>(x + i));
    most = larger(most, (U32)keep(finite(size), size));
  }
  return largest_of(most);
}

template <class Own, class Scale, int per, size_t... P, class... C>
struct BlockwiseIn<Own, Scale, per, std::index_sequence<P...>, C...> {
  using Word = typename Scale::Word;
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
    encode_numbers(planes, count, x[0], random);
  }

  static void encode_numbers(PlanesAt planes, int count, const float* x, const uint32_t* random) {
    if constexpr (Own::format.stochastic)
      if (!random) return Own::Nearest::encode_numbers(planes, count, x, random);
    const auto bits = [&](int at) { return random ? load<U32>(random + at) : U32{}; };
    for (int first = 0; first < count; first += block)
      Own::encode_block(planes, first, padded(std::min(count, first + block)), x + first, bits);
  }

 protected:
  using Base = BlockwiseIn;

  static Word& scale_at(PlanesAt planes, int i) { return reinterpret_cast<Word*>(planes[words])[i / block]; }

  static void values_of(PlanesAt planes, int first, int end, Buffer& x) {
    each_half(planes, first, end, [&](int at, const Lanes<lanes>& own) { save(x + at, Own::number(own).x); });
  }

  // Numbers x of the elements from first to end. The scale of a row is given in its plane, those of blocks are decided here.
  template <class Bits>  // bits(at): random ones for the elements at and on
  static void encode_block(PlanesAt planes, int first, int end, const float* x, Bits bits) {
    if (per != PER_ROW) scale_at(planes, first) = Own::scale_of(largest_of(x, end - first));
    const Word scale = scale_at(planes, first);
    const auto codes = [&](int at) { return Own::codes(load<F32>(x + at - first), bits(at), scale); };
    for (int i = first; i < end; i += LANES) {
      const Lanes<words> even = codes(i), odd = codes(i + W);
      (C::write(planes[P], i, even.x[P], odd.x[P]), ...);
    }
  }

 private:
  template <class Fn>  // fn(where they lie in a buffer, lanes)
  static void each_half(PlanesAt planes, int first, int end, Fn fn) {
    for (int i = first; i < end; i += LANES) {
      const F32 scale = Scale::number(scale_at(planes, i));
      fn(i, Lanes<lanes>{{C::template read<0>(planes[P], i)..., scale}});
      fn(i + W, Lanes<lanes>{{C::template read<1>(planes[P], i)..., scale}});
    }
  }
};

}  // namespace
}  // namespace collage
