// One stage of a step: every slot's planes are decoded into buffers in cache, the rule runs over these, and its new
// numbers are encoded. A rule is compiled once for every kind of number that grows in slot 0, whatever the formats.
#pragma once
#include "codecs.hpp"
#include "random.hpp"
#include "rules.hpp"
#include "walk.hpp"

// A loop is one function, in which vectors stay in registers. (Sanitized builds would take minutes for that.)
#if defined(__SANITIZE_ADDRESS__)
#define FLATTEN
#else
#define FLATTEN __attribute__((flatten))
#endif

namespace collage {
namespace {

constexpr int MAX_SOURCES = MAX_SLOTS * MAX_PLANES + 1;

// The lines of the elements after a stage. The rule waits for divisions while no load is under way, so it fetches them.
class Ahead {
 public:
  Ahead(const Piece& piece, const Shape& shape) {
    shape.each_plane([&](int s, int p, const Plane& plane) {
      if (plane.per == 1) add(piece.planes[s][p], plane.bytes);
    });
    if (shape.gradient_bytes) add(piece.gradient, shape.gradient_bytes);
  }

  void fetch(int i) const {  // of the chunk i elements further on
    for (int k = 0; k < count_; ++k) prefetch(at_[k] + i * bytes_[k]);
  }

 private:
  void add(const char* at, int bytes) {
    at += STAGE * bytes;
    for (int line = 0; line < LANES * bytes; line += 64) at_[count_] = at + line, bytes_[count_++] = bytes;
  }

  int count_ = 0;
  const char* at_[2 * MAX_SOURCES];
  int bytes_[2 * MAX_SOURCES];
};

struct Stage {
  alignas(64) Buffer gradient, delta;
  alignas(64) Parted slots[MAX_SLOTS];
  Kind kinds[MAX_SLOTS];
};

template <class N, class Number, int slot>
inline auto number_at(const Stage& stage, int i) {
  const Parted& x = stage.slots[slot];
  if constexpr (std::is_same_v<N, B16>)
    return Paper{{load<F32>(x[0] + i)}, {load<F32>(x[1] + i)}, stage.kinds[slot]};
  else
    return Held<std::conditional_t<slot == 0, Number, Register<F32>>>::load(x, i);
}

template <class Rule, class N, class Number, bool measured, size_t... K>
inline void update(Stage& stage, const float* row, int count, const Ahead& ahead, std::index_sequence<K...>) {
  const typename Rule::template Constants<N> constants{Row<N>(row)};
  const auto at = [&](int i) {
    const N g = in_register<N>(Rule::gradient ? load<F32>(stage.gradient + i) : F32{});
    const auto then = [&](N delta, auto... numbers) {
      if (measured) save(stage.delta + i, to_float(delta));
      int slot = 0;
      (hold(numbers, stage.slots[slot++], i), ...);
    };
    Rule::update(g, constants, then, number_at<N, Number, K>(stage, i)...);
  };
  for (int i = 0; i < count; i += LANES) {
    ahead.fetch(i);
    at(i);
    at(i + W);
  }
}

using Update = void (*)(Stage&, const float* row, int count, const Ahead&, bool measured);

template <class Rule, class N, class Number>
FLATTEN void update(Stage& stage, const float* row, int count, const Ahead& ahead, bool measured) {
  constexpr std::make_index_sequence<Rule::reads> slots;
  if (Rule::measured && (measured || std::is_same_v<N, B16>))  // there one store more does not matter
    update<Rule, N, Number, Rule::measured>(stage, row, count, ahead, slots);
  else
    update<Rule, N, Number, std::is_same_v<N, B16> && Rule::measured>(stage, row, count, ahead, slots);
}

// The rule's loop for slot 0 in that format.
template <class Rule, class... F>
Update update_of(const char* format, bool bfloat16_arithmetic, List<F...>) {
  if (bfloat16_arithmetic) return update<Rule, B16, Paper>;
  Update found = update<Rule, F32, Register<F32>>;
  if constexpr (Rule::grows)
    (void)((!std::strcmp(format, F::format.name) && (found = update<Rule, F32, NumberOf<F>>)) || ...);
  return found;
}

// The random bits of a stage, slot after slot: slots of one salt share the words.
class Noise {
 public:
  Noise(const Tensor& t, const Piece& piece) : t_(t), piece_(piece) {}

  const uint32_t* bits(uint64_t salt, int part) {
    if (!drawn_ || salt != salt_) Random(t_, salt, piece_.begin, piece_.count).words(words_);
    drawn_ = true;
    salt_ = salt;
    const int end = padded(piece_.count);
    for (int i = 0; i < end; i += W) save(bits_ + i, bits_of(load<U32>(words_ + i), part));
    return bits_;
  }

 private:
  const Tensor& t_;
  const Piece& piece_;
  bool drawn_ = false;
  uint64_t salt_ = 0;
  alignas(64) uint32_t words_[STAGE], bits_[STAGE];
};

}  // namespace
}  // namespace collage
