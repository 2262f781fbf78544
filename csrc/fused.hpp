// The rows that deserve a loop of their own, in which numbers stay in registers from planes to planes: those that most
// steps are made of. It does the plain part of a step; what is measured, strided, not finite goes through stage.hpp.
#pragma once
#include <tuple>

#include "stage.hpp"

namespace collage {
namespace {

constexpr int AHEAD = 512;  // elements between what is computed and what is fetched

// Carries out the step of a piece's elements. Returns how many it has done before a chunk that is not finite.
using Fused = int (*)(const Piece&, const float* row, const uint32_t* words);

// One half of a chunk once it is computed.
template <class... F>
struct Half {
  F32 whole;
  std::tuple<Lanes<F::lanes>...> fresh;
};

template <class Rule, class Gradient, class Slots, class... F>
struct FusedLoop;

template <class Rule, class Gradient, size_t... K, class... F>
struct FusedLoop<Rule, Gradient, std::index_sequence<K...>, F...> {
  using Constants = typename Rule::template Constants<F32>;
  static constexpr bool random = (F::format.stochastic || ...);

  FLATTEN static int run(const Piece& piece, const float* row, const uint32_t* words) {
    const Constants constants{Row<F32>(row)};
    for (int i = 0; i < piece.count; i += LANES) {
      (fetch(piece.planes[K], i + AHEAD, F::format), ...);
      fetch(piece.gradient, i + AHEAD, Gradient::BYTES);
      const Half<F...> even = compute<0>(piece, i, constants, words), odd = compute<1>(piece, i, constants, words);
      if (__builtin_expect(!all(finite(even.whole + odd.whole)), false)) return i;
      (F::write(piece.planes[K], i, std::get<K>(even.fresh), std::get<K>(odd.fresh)), ...);
    }
    return piece.count;
  }

 private:
  template <int half>
  static Half<F...> compute(const Piece& piece, int i, const Constants& constants, const uint32_t* words) {
    const U32 word = random ? load<U32>(words + i + half * W) : U32{};
    Half<F...> result;
    const auto then = [&](F32, auto... numbers) {
      result.whole = (F::whole(numbers) + ...);
      result.fresh = {F::codes(numbers, bits_of(word, int(K)), Finite<true>{})...};
    };
    Rule::update(Gradient::template read<half>(piece.gradient, i), constants, then,
                 F::number(F::template read<half>(piece.planes[K], i))...);
    return result;
  }

  static void fetch(PlanesAt planes, int i, const Format& format) {
    for (int p = 0; p < format.count; ++p) fetch(planes[p], i, format.planes[p].bytes);
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
using Bf16x2 = Expansion<BF16>;

using FusedRows = List<                                                                               //
    Bf16Row<AdamW, Bf16, Bf16, Bf16>,                                                                 // bf16
    Bf16Row<AdamW, Bf16x2, Bf16, Bf16>, Bf16Row<Adam, Bf16x2, Bf16, Bf16>,                            // collage-light
    Bf16Row<AdamW, Bf16x2, Bf16, Bf16x2>, Bf16Row<Adam, Bf16x2, Bf16, Bf16x2>,                        // collage-plus
    Bf16Row<SgdMomentum, Bf16x2, Bf16>, Bf16Row<Lion, Bf16x2, Bf16>,                                  // of both
    Bf16Row<AdamW, Expansion<BF16, 2, true>, Single<BF16, true>, Expansion<BF16, 2, true>>,           // collage-plus-sr
    Bf16Row<AdamW, Master<BF16>, Single<FP32>, Single<FP32>>,                                         // fp32-master
    FusedRow<AdamW, FP32, Single<FP32>, Single<FP32>, Single<FP32>>>;                                 // fp32

template <class... Rows>
Fused fused_of(const Request& request, List<Rows...>) {
  Fused found = nullptr;
  (void)((found = Rows::of(request)) || ...);
  return found;
}

}  // namespace
}  // namespace collage
