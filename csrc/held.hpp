// A slot in a loop in which numbers stay in registers: how it is read, what waits in cache, and when it is written.
#pragma once
#include <type_traits>

#include "formats.hpp"

namespace collage {
namespace {

// A number that the rule has grown before: what is left to it is what follows from that.
struct Known {
  F32 x;

  template <class Factor>
  Known scaled(const Factor&) const { return *this; }
  Known grown(F32) const { return *this; }
  F32 value() const { return x; }
};

// A slot whose numbers wait for no others of their block.
struct AtOnce {
  template <class Number>
  static void hold(const Number&, float*) {}
  static bool all_known() { return true; }
  static void decide(PlanesAt, int) {}

  template <class Bits>
  static void finish(PlanesAt, int, int, const float*, Bits) {}
};

// A slot in the loop: where every plane has a word per element, they are written at once.
template <class F, class = void>
struct InLoop : AtOnce {
  static constexpr int block = BLOCK;
  static constexpr bool at_once = true, of_row = false;

  InLoop(PlanesAt, int) {}
  static bool fits(PlanesAt, int) { return true; }
  static bool usual() { return true; }

  template <int half>
  static auto read(PlanesAt planes, int i) {
    return F::number(F::template read<half>(planes, i));
  }

  template <int half, class Is>
  static auto number(PlanesAt planes, int i, const float*, Is) {
    return read<half>(planes, i);
  }

  template <class Number, class Is>
  static void take(const Number& number, float*, U32 random, Is is_finite, F32& whole, Lanes<F::words>& fresh) {
    whole += F::whole(number);
    fresh = F::codes(number, random, is_finite);
  }

  static void write(PlanesAt planes, int i, const Lanes<F::words>& even, const Lanes<F::words>& odd) {
    F::write(planes, i, even, odd);
  }
};

// One with blocks: new numbers are held until all of a block are there.
template <class F>
struct InLoop<F, std::void_t<typename F::OfBlock>> : F::OfBlock {
  static constexpr int block = F::block;
  static constexpr bool at_once = false, of_row = false;

  using F::OfBlock::OfBlock;
  static bool usual() { return true; }

  void hold(const Register<F32>& number, float* held) {
    this->count(number.x);
    save(held, number.x);
  }

  template <int half, class Is>
  static Known number(PlanesAt, int, const float* held, Is) {
    return {load<F32>(held)};
  }

  template <class Is>
  void take(Known number, float*, U32 random, Is, F32&, Lanes<F::words>& fresh) const {
    fresh = this->codes(number.x, random);
  }
};

// One with a scale for a row: numbers are only left where all of it will be.
template <class F>
struct InLoop<F, std::void_t<typename F::OfRow>> : F::OfRow, AtOnce {
  static constexpr int block = BLOCK;
  static constexpr bool at_once = false, of_row = true;

  InLoop(PlanesAt planes, int) : F::OfRow(planes) {}
  static bool fits(PlanesAt planes, int) { return F::OfRow::fits(planes); }

  template <int half, class Is>
  Register<F32> number(PlanesAt planes, int i, const float*, Is is_usual) {
    if constexpr (is_usual()) return this->template read<half>(planes, i);
    return F::OfRow::template careful<half>(planes, i);
  }

  template <class Is>
  static void take(const Register<F32>& number, float* left, U32, Is, F32&, Lanes<F::words>&) {
    save(left, number.x);
  }

  static void write(PlanesAt, int, const Lanes<F::words>&, const Lanes<F::words>&) {}
};

}  // namespace
}  // namespace collage
