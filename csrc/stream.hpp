// The physical limit of a step: read and write the same planes, without arithmetic. For `collage bench`.
#pragma once
#include "operations.hpp"

namespace collage {
namespace {

// Every plane comes back as it was, and depends on the gradient having been read. Contiguous tensors only.
struct Stream final : Operation {
  Stream(const Codec* const (&codecs)[MAX_SLOTS], int count, const Codec* gradient_codec)
      : Operation(codecs, count, gradient_codec) {}

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    volatile uint32_t zero = 0;  // a constant would let the compiler drop the copy
    const U32 mask = U32{} + zero;
    const Shape shape(*this);
    for (int64_t b = first_block; b < end_block; ++b) {
      const int64_t in_row = blocks_in_row(t.columns), first = b % in_row * BLOCK;
      const Piece piece = piece_at(t, shape, b / in_row, first, block_size(t, b));
      for (int i = 0; i + STAGE <= piece.count; i += STAGE) pass(stage_of(piece, shape, i), shape, mask);
    }
    return 0;
  }

 private:
  // All planes side by side, as a step walks them: memory is faster then than plane by plane.
  static void pass(const Piece& piece, const Shape& shape, U32 mask) {
    for (int i = 0; i < STAGE; i += LANES) {
      U32 g{};
      each_vector(piece.gradient, i, shape.gradient_bytes, [&](const char* at) { g |= load<U32>(at); });
      g &= mask;
      shape.each_plane([&](int s, int p, const Plane& plane) {
        if (plane.per == 1) each_vector(piece.planes[s][p], i, plane.bytes, [&](char* at) { save(at, load<U32>(at) | g); });
      });
    }
  }

  template <class At, class Fn>
  static void each_vector(At plane, int i, int bytes, Fn fn) {
    const At end = plane + (i + LANES) * bytes;
    for (At at = plane + i * bytes; at < end; at += sizeof(U32)) {
      prefetch(at + AHEAD * bytes);
      fn(at);
    }
  }
};

}  // namespace
}  // namespace collage
