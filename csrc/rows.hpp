// A rule's step where what it writes has a scale for a whole row: a function of the row's new numbers, so it is known once
// the rule has run over all of them. It runs twice, first to see the largest; nothing is kept, however long a row is.
#pragma once
#include "step.hpp"

namespace collage {
namespace {

// A row belongs to whom its first block does.
class StepInRows final : public Step {
 public:
  using Step::Step;

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    each_row(t, first_block, end_block, [&](int64_t row, int64_t first, int64_t end) {
      Scales scales{};
      fit(t, first, end, scales);
      blocks(t, first, end, &scales);
      each_scale([&](int s, int p, int bytes) { std::memcpy(t.planes[s][p] + row * bytes, scales[s], bytes); });
    });
    return 0;
  }

 private:
  template <class Fn>  // fn(slot, plane, bytes) of those that are written
  void each_scale(Fn fn) const {
    for (int s = 0; s < slots; ++s)
      if (const int last = formats[s]->count - 1; writes[s] && codec(s).fit) fn(s, last, formats[s]->planes[last].bytes);
  }

  void fit(const Tensor& t, int64_t first, int64_t end, Scales& scales) const {
    uint32_t largest[MAX_SLOTS]{};
    const Shape shape(*this);
    for (int64_t b = first; b < end; ++b)
      walk(t, shape, b, [&](const Piece& piece, int) {
        for (int i = 0; i < piece.count; i += STAGE) {
          const Piece part = stage_of(piece, shape, i);
          Stage stage;
          compute(t, shape, part, stage, false);
          each_scale([&](int s, int, int) {
            largest[s] = std::max(largest[s], largest_of(stage.slots[s][0], padded(part.count)));
          });
        }
      });
    each_scale([&](int s, int, int) { codec(s).fit(scales[s], largest[s]); });
  }
};

}  // namespace
}  // namespace collage
