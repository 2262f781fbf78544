// A rule's step where theta has a scale for a whole row: a function of the row's new numbers, so it is known once the rule
// has run over all of them. These wait in cache; where they cannot, the rule runs twice, first to see the largest.
#pragma once
#include "step.hpp"

namespace collage {
namespace {

constexpr int LONGEST = 1 << 14;  // elements of a row that waits: 64 KiB

// A row belongs to whom its first block does.
class StepInRows final : public Step {
 public:
  template <class Rule>
  StepInRows(const Request& r, const Codec* const (&codecs)[MAX_SLOTS], const Codec* gradient_codec, Rule rule)
      : Step(r, codecs, gradient_codec, rule) {
    for (int s = 1; s < slots; ++s) alone_ &= !(writes[s] && codec(s).fit);
  }

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    const bool waits = alone_ && !measures(t) && t.columns <= LONGEST;
    each_row(t, first_block, end_block, [&](int64_t row, int64_t first, int64_t end) {
      waits ? once(t, row, first, end) : twice(t, row, first, end);
    });
    return 0;
  }

 private:
  void once(const Tensor& t, int64_t row, int64_t first, int64_t end) const {
    const Shape shape(*this);
    alignas(64) float numbers[LONGEST];
    for (int64_t b = first; b < end; ++b)
      walk(t, shape, b, [&](const Piece& piece, int at) { leave(t, shape, piece, numbers + (b - first) * BLOCK + at); });
    codec(0).fit(scale_at(t, 0, row), largest_of(numbers, padded(int(t.columns))));
    for (int64_t b = first; b < end; ++b)
      walk(t, shape, b, [&](const Piece& piece, int at) { encode(t, shape, piece, numbers + (b - first) * BLOCK + at); });
  }

  // The step of a piece's elements, but for theta, whose new numbers are left.
  void leave(const Tensor& t, const Shape& shape, const Piece& piece, float* numbers) const {
    for (int i = fused(t, piece, numbers); i < piece.count; i += STAGE) {
      const Piece part = stage_of(piece, shape, i);
      Stage stage;
      compute(t, shape, part, stage, false);
      store(t, part, stage.slots, 1);
      std::memcpy(numbers + i, stage.slots[0][0], padded(part.count) * sizeof(float));
    }
  }

  void encode(const Tensor& t, const Shape& shape, const Piece& piece, const float* numbers) const {
    for (int i = 0; i < piece.count; i += STAGE) {
      const Piece part = stage_of(piece, shape, i);
      Noise noise(t, part);
      codec(0).encode_numbers(part.planes[0], part.count, numbers + i, bits_of(0, noise));
    }
  }

  void twice(const Tensor& t, int64_t row, int64_t first, int64_t end) const {
    Scales scales{};
    uint32_t largest[MAX_SLOTS]{};
    see(t, first, end, largest);
    each_fit([&](int s) { codec(s).fit(scales[s], largest[s]); });
    blocks(t, first, end, &scales);
    each_fit([&](int s) { codec(s).fit(scale_at(t, s, row), largest[s]); });
  }

  void see(const Tensor& t, int64_t first, int64_t end, uint32_t* largest) const {
    const Shape shape(*this);
    for (int64_t b = first; b < end; ++b)
      walk(t, shape, b, [&](const Piece& piece, int) {
        for (int i = 0; i < piece.count; i += STAGE) {
          const Piece part = stage_of(piece, shape, i);
          Stage stage;
          compute(t, shape, part, stage, false);
          each_fit([&](int s) { largest[s] = std::max(largest[s], largest_of(stage.slots[s][0], padded(part.count))); });
        }
      });
  }

  template <class Fn>  // fn(slot) of those that are written and have a scale for a row
  void each_fit(Fn fn) const {
    for (int s = 0; s < slots; ++s)
      if (writes[s] && codec(s).fit) fn(s);
  }

  char* scale_at(const Tensor& t, int slot, int64_t row) const {
    const int last = formats[slot]->count - 1;
    return t.planes[slot][last] + row * formats[slot]->planes[last].bytes;
  }

  bool alone_ = true;  // theta, of what is written
};

}  // namespace
}  // namespace collage
