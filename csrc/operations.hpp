// What is done to planes beside a rule's step, format by format: decode, encode, broken, and the stream of bytes.
#pragma once
#include "step.hpp"

namespace collage {
namespace {

// fn(piece) for all stages of these blocks.
template <class Fn>
inline void each_stage(const Kernel& kernel, const Tensor& t, int64_t first_block, int64_t end_block, Fn fn) {
  const Shape shape(kernel);
  for (int64_t b = first_block; b < end_block; ++b)
    walk(t, shape, b, [&](const Piece& piece, int) {
      for (int i = 0; i < piece.count; i += STAGE) fn(stage_of(piece, shape, i));
    });
}

class Operation : public Kernel {
 public:
  Operation(const Codec* const (&codecs)[MAX_SLOTS], int count, const Codec* gradient_codec) : codec_(codecs[0]) {
    slots = count;
    for (int s = 0; s < count; ++s) formats[s] = codecs[s]->format;
    if (gradient_codec) gradient = gradient_codec->format;
  }

 protected:
  const Codec* codec_;
};

// Slot 0's values are written to slot 1, which is float32.
struct Decode final : Operation {
  explicit Decode(const Codec* const (&codecs)[MAX_SLOTS]) : Operation(codecs, 2, nullptr) { writes[1] = true; }

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    each_stage(*this, t, first_block, end_block, [&](const Piece& piece) {
      Parted x;
      codec_->values(piece.planes[0], piece.count, x[0]);
      codec<Single<FP32>>.encode(piece.planes[1], piece.count, x, nullptr);
    });
    return 0;
  }
};

// Slot 0 is made of the gradient, which is float32. Where a row has a scale it belongs to whom its first block does.
struct Encode final : Operation {
  Encode(const Codec* const (&codecs)[MAX_SLOTS], const Codec* gradient_codec, RandomBits random)
      : Operation(codecs, 1, gradient_codec), random_(random) {
    writes[0] = true;
  }

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    if (!codec_->fit) return encode(t, first_block, end_block);
    const int last = formats[0]->count - 1, bytes = formats[0]->planes[last].bytes;
    each_row(t, first_block, end_block, [&](int64_t row, int64_t first, int64_t end) {
      codec_->fit(t.planes[0][last] + row * bytes, largest(t, first, end));
      encode(t, first, end);
    });
    return 0;
  }

 private:
  int64_t encode(const Tensor& t, int64_t first_block, int64_t end_block) const {
    each_stage(*this, t, first_block, end_block, [&](const Piece& piece) {
      Parted x;
      read(piece, x[0]);
      Noise noise(t, piece);
      codec_->encode(piece.planes[0], piece.count, x,
                     random_.given(*codec_->format) ? noise.bits(random_.salt, random_.part) : nullptr);
    });
    return 0;
  }

  uint32_t largest(const Tensor& t, int64_t first_block, int64_t end_block) const {
    uint32_t most = 0;
    each_stage(*this, t, first_block, end_block, [&](const Piece& piece) {
      Buffer x;
      read(piece, x);
      most = std::max(most, largest_of(x, padded(piece.count)));
    });
    return most;
  }

  static void read(const Piece& piece, Buffer& x) {
    char* const at[] = {const_cast<char*>(piece.gradient)};
    codec<Single<FP32>>.values(at, piece.count, x);
  }

  RandomBits random_;
};

struct Broken final : Operation {
  explicit Broken(const Codec* const (&codecs)[MAX_SLOTS]) : Operation(codecs, 1, nullptr) {}

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    int64_t total = 0;
    each_stage(*this, t, first_block, end_block,
               [&](const Piece& piece) { total += codec_->broken(piece.planes[0], piece.count); });
    return total;
  }
};

}  // namespace
}  // namespace collage
