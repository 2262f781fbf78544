// The rows that deserve a loop of their own, in which numbers stay in registers from planes to planes: those that most
// steps are made of. It does the plain part of a step; what is measured, strided, not finite goes through stage.hpp.
// Where formats have blocks, the rule runs twice over the length of one: first numbers only grow, which wait in cache until
// their scale is known; then all else follows, and they are encoded while the processor divides.
#pragma once
#include <array>
#include <tuple>

#include "held.hpp"
#include "stage.hpp"

namespace collage {
namespace {

constexpr int AHEAD = 512;  // elements between what is computed and what is fetched

// Carries out the step of a piece's elements. Returns how many it has done before some that are not finite or not usual.
// numbers: where those of a row are left, lane by lane, whose scale is not known yet.
using Fused = int (*)(const Piece&, const float* row, const uint32_t* words, float* numbers);

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
    alignas(64) Held held;
    for (int first = 0, done; first < piece.count; first += block) {
      const int end = padded(std::min(piece.count, first + block));
      if (!(InLoop<F>::fits(piece.planes[K], first) && ...)) return first;
      Slots slots(InLoop<F>(piece.planes[K], first)...);
      if (block != BLOCK && !grow(piece, first, end, constants, slots, held)) return first;
      if ((done = complete(piece, first, end, constants, words, slots, held, numbers)) < end) return done;
      const auto bits = [&](auto k) { return [=](int at) { return bits_of(load<U32>(words + at), k()); }; };
      (std::get<K>(slots).finish(piece.planes[K], first, end, held[K], bits(std::integral_constant<int, K>{})), ...);
    }
    return piece.count;
  }

 private:
  using Held = float[sizeof...(F)][block];
  using Places = std::array<float*, sizeof...(F)>;  // of new numbers, slot by slot

  // The part of the rule in which numbers grow that share a scale, which is decided here. Whether it could be.
  static bool grow(const Piece& piece, int first, int end, const Constants& constants, Slots& slots, Held& held) {
    for (int i = first; i < end; i += LANES) {
      grow<0>(piece, i, constants, slots, {held[K] + i - first...});
      grow<1>(piece, i, constants, slots, {held[K] + i - first + W...});
    }
    if (!(std::get<K>(slots).all_known() && ...)) return false;
    (std::get<K>(slots).decide(piece.planes[K], first), ...);
    return true;
  }

  template <int half>
  static void grow(const Piece& piece, int i, const Constants& constants, Slots& slots, const Places& at) {
    const auto then = [&](F32, auto... numbers) { (std::get<K>(slots).hold(numbers, at[K]), ...); };
    Rule::update(Gradient::template read<half>(piece.gradient, i), constants, then,
                 std::get<K>(slots).template read<half>(piece.planes[K], i)...);
  }

  // All of the rule. Returns where it stopped before what it has to be careful with.
  static int complete(const Piece& piece, int first, int end, const Constants& constants, const uint32_t* words,
                      Slots& slots, Held& held, float* numbers) {
    const auto half = [&](auto half, int i, auto is_finite) {
      const int at = i + half * W;
      return compute<half, is_finite>(piece, i, constants, words, slots,
                                      {InLoop<F>::of_row ? numbers + at : held[K] + at - first...});
    };
    constexpr std::integral_constant<int, 0> even_places;
    constexpr std::integral_constant<int, 1> odd_places;
    for (int i = first; i < end; i += LANES) {
      (fetch<F>(piece.planes[K], i + AHEAD, std::make_index_sequence<F::format.count>{}), ...);
      fetch(piece.gradient, i + AHEAD, Gradient::BYTES);
      Half<F...> even = half(even_places, i, Finite<true>{}), odd = half(odd_places, i, Finite<true>{});
      if (!of_row && __builtin_expect(!all_finite(even.whole + odd.whole), false)) {
        if (block == BLOCK) return i;  // others have written a part of their block
        even = half(even_places, i, Finite<false>{}), odd = half(odd_places, i, Finite<false>{});
      }
      (std::get<K>(slots).write(piece.planes[K], i, std::get<K>(even.fresh), std::get<K>(odd.fresh)), ...);
    }
    if (of_row && !(std::get<K>(slots).usual() && ...))
      for (int i = first; i < end; i += LANES)
        half(even_places, i, Finite<false>{}), half(odd_places, i, Finite<false>{});
    return end;
  }

  template <int half, bool is_finite>
  static Half<F...> compute(const Piece& piece, int i, const Constants& constants, const uint32_t* words, Slots& slots,
                            const Places& at) {
    const U32 word = random ? load<U32>(words + i + half * W) : U32{};
    Half<F...> result;
    const auto then = [&](F32, auto... numbers) {
      (std::get<K>(slots).take(numbers, at[K], bits_of(word, int(K)), Finite<is_finite>{}, result.whole,
                               std::get<K>(result.fresh)),
       ...);
    };
    Rule::update(Gradient::template read<half>(piece.gradient, i), constants, then,
                 std::get<K>(slots).template number<half>(piece.planes[K], i, at[K], Finite<is_finite>{})...);
    return result;
  }

  template <class G, size_t... P>
  static void fetch(PlanesAt planes, int i, std::index_sequence<P...>) {
    ((G::format.planes[P].per == 1 ? fetch(planes[P], i, G::format.planes[P].bytes) : void()), ...);
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
