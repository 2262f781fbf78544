// The rows that deserve a loop of their own, in which numbers stay in registers from planes to planes: those that most
// steps are made of. It does the plain part of a step; what is measured, strided, not finite goes through stage.hpp.
// Formats with blocks are held in cache for the length of one, until its scale is known.
#pragma once
#include <tuple>

#include "stage.hpp"

namespace collage {
namespace {

constexpr int AHEAD = 512;  // elements between what is computed and what is fetched

// Carries out the step of a piece's elements. Returns how many it has done before some that are not finite or not usual.
// numbers: where those of a row are left, lane by lane, whose scale is not known yet.
using Fused = int (*)(const Piece&, const float* row, const uint32_t* words, float* numbers);

// A slot in the loop: where every plane has a word per element, they are written at once.
template <class F, class = void>
struct InLoop {
  static constexpr int block = BLOCK;
  static constexpr bool at_once = true, of_row = false;

  InLoop(PlanesAt, int) {}
  static bool fits(PlanesAt, int, int) { return true; }
  static bool usual() { return true; }

  template <int half>
  static auto read(PlanesAt planes, int i) {
    return F::number(F::template read<half>(planes, i));
  }

  template <class Number, class Is>
  void take(const Number& number, float*, U32 random, Is is_finite, F32& whole, Lanes<F::words>& fresh) {
    whole += F::whole(number);
    fresh = F::codes(number, random, is_finite);
  }

  static void write(PlanesAt planes, int i, const Lanes<F::words>& even, const Lanes<F::words>& odd) {
    F::write(planes, i, even, odd);
  }

  template <class Bits>
  void finish(PlanesAt, int, int, const float*, Bits) const {}
};

// One with blocks: numbers are held until all of them are there.
template <class F>
struct InLoop<F, std::void_t<typename F::OfBlock>> : F::OfBlock {
  static constexpr int block = F::block;
  static constexpr bool at_once = false, of_row = false;

  using F::OfBlock::OfBlock;
  static bool usual() { return true; }

  template <class Is>
  void take(const Register<F32>& number, float* held, U32, Is, F32&, Lanes<F::words>&) {
    this->count(number.x);
    save(held, number.x);
  }

  static void write(PlanesAt, int, const Lanes<F::words>&, const Lanes<F::words>&) {}
};

// One with a scale for a row: numbers are only left where all of it will be.
template <class F>
struct InLoop<F, std::void_t<typename F::OfRow>> : F::OfRow {
  static constexpr int block = BLOCK;
  static constexpr bool at_once = false, of_row = true;

  InLoop(PlanesAt planes, int) : F::OfRow(planes) {}
  static bool fits(PlanesAt planes, int, int) { return F::OfRow::fits(planes); }

  template <class Is>
  void take(const Register<F32>& number, float* left, U32, Is, F32&, Lanes<F::words>&) {
    save(left, number.x);
  }

  static void write(PlanesAt, int, const Lanes<F::words>&, const Lanes<F::words>&) {}

  template <class Bits>
  void finish(PlanesAt, int, int, const float*, Bits) const {}
};

// One half of a chunk once it is computed.
template <class... F>
struct Half {
  F32 whole = -F32{};  // what adds nothing
  std::tuple<Lanes<F::words>...> fresh;
};

template <class Rule, class Gradient, class Slots, class... F>
struct FusedLoop;

template <class Rule, class Gradient, size_t... K, class... F>
struct FusedLoop<Rule, Gradient, std::index_sequence<K...>, F...> {
  using Constants = typename Rule::template Constants<F32>;
  using Slots = std::tuple<InLoop<F>...>;
  static constexpr bool random = (F::format.stochastic || ...);
  static constexpr int block = std::min({InLoop<F>::block...});
  static constexpr bool of_row = (InLoop<F>::of_row || ...);
  static_assert(!of_row || !(InLoop<F>::at_once || ...), "what turns out not to be usual is done anew");

  FLATTEN static int run(const Piece& piece, const float* row, const uint32_t* words, float* numbers) {
    const Constants constants{Row<F32>(row)};
    alignas(64) float held[sizeof...(F)][block];
    for (int first = 0; first < piece.count; first += block) {
      const int end = padded(std::min(piece.count, first + block));
      if (!(InLoop<F>::fits(piece.planes[K], first, end) && ...)) return first;
      Slots slots(InLoop<F>(piece.planes[K], first)...);
      for (int i = first; i < end; i += LANES) {
        (fetch(piece.planes[K], i + AHEAD, F::format), ...);
        fetch(piece.gradient, i + AHEAD, Gradient::BYTES);
        float* const at[] = {InLoop<F>::of_row ? numbers + i : held[K] + i - first...};
        Half<F...> even = compute<0, true>(piece, i, constants, words, slots, at);
        Half<F...> odd = compute<1, true>(piece, i, constants, words, slots, at);
        if (__builtin_expect(!all_finite(even.whole + odd.whole), false)) {
          if (block == BLOCK) return i;  // others have written a part of their block
          even = compute<0, false>(piece, i, constants, words, slots, at);
          odd = compute<1, false>(piece, i, constants, words, slots, at);
        }
        (std::get<K>(slots).write(piece.planes[K], i, std::get<K>(even.fresh), std::get<K>(odd.fresh)), ...);
      }
      if (of_row && !(std::get<K>(slots).usual() && ...)) return first;
      const auto bits = [&](auto k) { return [=](int at) { return bits_of(load<U32>(words + at), k()); }; };
      (std::get<K>(slots).finish(piece.planes[K], first, end, held[K], bits(std::integral_constant<int, K>{})), ...);
    }
    return piece.count;
  }

 private:
  template <int half, bool is_finite>
  static Half<F...> compute(const Piece& piece, int i, const Constants& constants, const uint32_t* words, Slots& slots,
                            float* const* held) {
    const U32 word = random ? load<U32>(words + i + half * W) : U32{};
    Half<F...> result;
    const auto then = [&](F32, auto... numbers) {
      (std::get<K>(slots).take(numbers, held[K] + half * W, bits_of(word, int(K)), Finite<is_finite>{}, result.whole,
                               std::get<K>(result.fresh)),
       ...);
    };
    Rule::update(Gradient::template read<half>(piece.gradient, i), constants, then,
                 std::get<K>(slots).template read<half>(piece.planes[K], i)...);
    return result;
  }

  static void fetch(PlanesAt planes, int i, const Format& format) {
    for (int p = 0; p < format.count; ++p)
      if (format.planes[p].per == 1) fetch(planes[p], i, format.planes[p].bytes);
  }

  static void fetch(const char* plane, int i, int bytes) {
    for (int line = 0; line < LANES * bytes; line += 64) prefetch(plane + i * bytes + line);
  }
};

template <class Rule, class Gradient, class... F>
struct FusedRow {
  static Fused of(const Request& r) {
    const char* const formats[] = {F::format.name...};
    bool fits = r.slots == sizeof...(F) && !std::strcmp(r.operation, Rule::name) && r.gradient &&
                !std::strcmp(r.gradient, Gradient::name.text) && !r.bfloat16_arithmetic;
    for (int s = 0; fits && s < r.slots; ++s)
      fits = !std::strcmp(r.formats[s], formats[s]) && (!(F::format.stochastic || ...) || (!r.salts[s] && r.parts[s] == s));
    return fits ? FusedLoop<Rule, Gradient, std::index_sequence_for<F...>, F...>::run : nullptr;
  }
};

template <class Rule, class... F>
using Bf16Row = FusedRow<Rule, BF16, F...>;

using Bf16 = Single<BF16>;
using Bf16Sr = Single<BF16, true>;
using Bf16x2 = Expansion<BF16>;
using Bf16x2Sr = Expansion<BF16, 2, true>;
using Fp32 = Single<FP32>;
using Int8Sr = Companded<Int8, true>;
using UInt8Sr = Companded<Integer<uint8_t>, true>;

using FusedRows = List<                                                            //
    Bf16Row<AdamW, Bf16, Bf16, Bf16>,                                              // bf16
    Bf16Row<AdamW, Bf16x2, Bf16, Bf16>, Bf16Row<Adam, Bf16x2, Bf16, Bf16>,         // collage-light
    Bf16Row<AdamW, Bf16x2, Bf16, Bf16x2>, Bf16Row<Adam, Bf16x2, Bf16, Bf16x2>,     // collage-plus
    Bf16Row<SgdMomentum, Bf16x2, Bf16>, Bf16Row<Lion, Bf16x2, Bf16>,               // both of them
    Bf16Row<AdamW, Bf16x2Sr, Bf16Sr, Bf16x2Sr>,                                    // collage-plus-sr
    Bf16Row<AdamW, Bf16Sr, Bf16Sr, Bf16Sr>,                                        // stochastic
    Bf16Row<AdamW, Bf16, Fp32, Fp32>, Bf16Row<AdamW, Master<BF16>, Fp32, Fp32>,    // fp32-states, fp32-master
    FusedRow<AdamW, FP32, Fp32, Fp32, Fp32>,                                       // fp32
    FusedRow<AdamW, FP16, Expansion<FP16>, Bf16, Bf16>,                            // collage-fp16
    Bf16Row<AdamW, Cut<Int16>, Bf16, Bf16x2>,                                      // collage-exact
    Bf16Row<AdamW, Cut<Int16>, Bf16Sr, Bf16Sr>,                                    // collage-exact-lean
    Bf16Row<AdamW, Bf16x2Sr, Int8Sr, UInt8Sr>,                                     // collage-8bit-plus
    Bf16Row<AdamW, Cut<Int8, true>, Int8Sr, UInt8Sr>,                              // collage-8bit
    Bf16Row<AdamW, ScaledWord<Int16>, Int8Sr, UInt8Sr>,                            // collage-fp8
    Bf16Row<AdamW, ScaledWord<Int8, true>, Int8Sr, UInt8Sr>>;                      // collage-fp8-lean

template <class... Rows>
Fused fused_of(const Request& request, List<Rows...>) {
  Fused found = nullptr;
  (void)((found = Rows::of(request)) || ...);
  return found;
}

}  // namespace
}  // namespace collage
