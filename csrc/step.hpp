// A rule's step on any formats.
#pragma once
#include "fused.hpp"
#include "stage.hpp"

namespace collage {
namespace {

// What a slot's random bits are drawn from.
struct RandomBits {
  uint64_t salt;
  int part;  // of a word; -1: none are given, all is rounded to nearest

  bool given(const Format& format) const { return format.stochastic && part >= 0; }
};

// New scales of one row, slot by slot: those in the planes are the old numbers', until all of these are replaced.
using Scales = char[MAX_SLOTS][4];

class Step : public Kernel {
 public:
  template <class Rule>
  Step(const Request& r, const Codec* const (&codecs)[MAX_SLOTS], const Codec* gradient_codec, Rule)
      : reads_(Rule::reads),
        measured_(Rule::measured),
        gradient_codec_(gradient_codec),
        update_(update_of<Rule>(r.formats[0], r.bfloat16_arithmetic, Formats{})),
        fused_(fused_of(r, FusedRows{})) {
    slots = r.slots;
    gradient = gradient_codec ? gradient_codec->format : nullptr;
    constants = sizeof(typename Rule::template Constants<F32>) / sizeof(F32);
    for (int s = 0; s < slots; ++s) {
      const bool in_parts = r.bfloat16_arithmetic ? codecs[s]->kind != Kind::one : s == 0 && Rule::grows && codecs[s]->expanded;
      formats[s] = codecs[s]->format;
      stochastic_ |= formats[s]->stochastic;
      writes[s] = s < Rule::writes;
      slots_[s] = {codecs[s], {r.salts[s], r.parts[s]}, in_parts};
    }
  }

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    blocks(t, first_block, end_block, nullptr);
    return 0;
  }

 protected:
  const Codec& codec(int slot) const { return *slots_[slot].codec; }
  bool measures(const Tensor& t) const { return t.sums && measured_; }

  void blocks(const Tensor& t, int64_t first_block, int64_t end_block, Scales* scales) const {
    const Shape shape(*this);
    for (int64_t b = first_block; b < end_block; ++b) {
      if (measures(t)) {
        Sums sums(block_size(t, b));
        walk(t, shape, b, [&](const Piece& piece, int at) { stages(t, shape, piece, 0, at, scales, &sums); });
        sums.finish(t.sums + b * SUMS);
      } else {
        walk(t, shape, b, [&](const Piece& piece, int at) {
          stages(t, shape, piece, scales ? 0 : fused(t, piece, nullptr), at, scales, nullptr);
        });
      }
    }
  }

  // What the rule makes of a stage's elements, in buffers.
  void compute(const Tensor& t, const Shape& shape, const Piece& piece, Stage& stage, bool measured) const {
    load(t, piece, stage);
    update_(stage, t.constants, piece.count, Ahead(piece, shape), measured);
    if (piece.count % LANES) clear(stage, piece.count);
  }

  // How many elements of a piece are done by its own loop.
  int fused(const Tensor& t, const Piece& piece, float* numbers) const {
    if (!fused_ || t.maximize || t.scale != 1.0f) return 0;
    alignas(64) uint32_t words[BLOCK];
    if (stochastic_) Random(t, 0, piece.begin, piece.count).words(words);
    return fused_(piece, t.constants, words, numbers);
  }

  // What is in buffers, slot `first` and on.
  void store(const Tensor& t, const Piece& piece, const Parted* x, int first) const {
    Noise noise(t, piece);
    for (int s = first; s < slots; ++s) {
      if (!writes[s]) continue;
      const Codec& own = codec(s);
      (slots_[s].in_parts ? own.encode_parts : own.encode)(piece.planes[s], piece.count, x[s], bits_of(s, noise));
    }
  }

  const uint32_t* bits_of(int slot, Noise& noise) const {
    const RandomBits& random = slots_[slot].random;
    return random.given(*formats[slot]) ? noise.bits(random.salt, random.part) : nullptr;
  }

 private:
  struct Slot {
    const Codec* codec;
    RandomBits random;
    bool in_parts;  // the rule is given, and leaves, components instead of values
  };

  void stages(const Tensor& t, const Shape& shape, const Piece& piece, int done, int at, Scales* scales,
              Sums* sums) const {
    for (int i = done; i < piece.count; i += STAGE) {
      const Piece part = stage_of(piece, shape, i);
      stage(t, shape, part, scales ? scaled(part, *scales) : part, at + i, sums);
    }
  }

  // The same elements under new scales.
  Piece scaled(Piece piece, Scales& scales) const {
    for (int s = 0; s < slots; ++s)
      if (writes[s] && codec(s).fit) piece.planes[s][formats[s]->count - 1] = scales[s];
    return piece;
  }

  void stage(const Tensor& t, const Shape& shape, const Piece& from, const Piece& to, int at, Sums* sums) const {
    Stage stage;
    Parted old;
    if (sums) codec(0).decode(from.planes[0], from.count, old);
    compute(t, shape, from, stage, sums != nullptr);
    store(t, to, stage.slots, 0);
    if (!sums) return;
    codec(0).decode(to.planes[0], to.count, stage.slots[0]);
    codec(0).measure(old, stage.slots[0], stage.delta, to.count, at, *sums);
  }

  void load(const Tensor& t, const Piece& piece, Stage& stage) const {
    for (int s = 0; s < slots; ++s) {
      const Slot& slot = slots_[s];
      stage.kinds[s] = slot.codec->kind;
      if (s >= reads_) continue;
      if (slot.in_parts)
        slot.codec->decode(piece.planes[s], piece.count, stage.slots[s]);
      else
        slot.codec->values(piece.planes[s], piece.count, stage.slots[s][0]);
    }
    if (!gradient) return;
    char* const at[] = {const_cast<char*>(piece.gradient)};
    gradient_codec_->values(at, piece.count, stage.gradient);
    if (t.scale == 1.0f && !t.maximize) return;
    for (int i = 0; i < padded(piece.count); i += W) {
      const F32 g = collage::load<F32>(stage.gradient + i) / splat(t.scale);
      save(stage.gradient + i, t.maximize ? -g : g);
    }
  }

  void clear(Stage& stage, int count) const {
    clear_padding(stage.delta, count);
    for (int s = 0; s < slots; ++s)
      for (Buffer& x : stage.slots[s]) clear_padding(x, count);
  }

  int reads_;
  bool measured_, stochastic_ = false;
  const Codec* gradient_codec_;
  Slot slots_[MAX_SLOTS]{};
  Update update_;
  Fused fused_;
};

}  // namespace
}  // namespace collage
