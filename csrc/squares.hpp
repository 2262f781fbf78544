// The sums of the squares of gradients: their norm, and whether they are finite. Each is read once, a block at a time.
#pragma once
#include "operations.hpp"

namespace collage {
namespace {

// Of W numbers.
struct Pair {
  F64 lower, upper;
};

// The gradient is slot 0's one plane, of components C.
template <class C>
struct Squares final : Operation {
  explicit Squares(const Codec* const (&codecs)[MAX_SLOTS]) : Operation(codecs, 1, nullptr) { sums = 1; }

  int64_t run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    const Shape shape(*this);
    for (int64_t b = first_block; b < end_block; ++b) {
      const bool in_place = !t.layout && block_size(t, b) == BLOCK;
      t.sums[b] = in_place ? sum(t.planes[0][0] + b * BLOCK * C::BYTES) : sum_of_copy(t, shape, b);
    }
    return 0;
  }

 private:
  static double sum_of_copy(const Tensor& t, const Shape& shape, int64_t block) {
    alignas(64) char memory[BLOCK * C::BYTES] = {};
    walk(t, shape, block, [&](const Piece& piece, int at) {
      std::memcpy(memory + at * C::BYTES, piece.planes[0][0], padded(piece.count) * C::BYTES);
    });
    return sum(memory);
  }

  // The tree jumps in memory; lines are touched in order before, which is what the processor fetches ahead of.
  FLATTEN static double sum(const char* block) {
    for (int line = 0; line < BLOCK * C::BYTES; line += 64) (void)*static_cast<const volatile char*>(block + line);
    return halved(tree<0, CHUNKS>(block)) + halved(tree<1, CHUNKS>(block));
  }

  // Of every (CHUNKS / n)th chunk, n of them.
  template <int half, int n>
  static Pair tree(const char* chunk) {
    if constexpr (n == 1) {
      const F32 x = C::template read<half>(chunk, 0);
      const F64 lower = wide<0>(x), upper = wide<1>(x);
      return {lower * lower, upper * upper};
    } else {
      const Pair a = tree<half, n / 2>(chunk);
      const Pair b = tree<half, n / 2>(chunk + CHUNKS / n * LANES * C::BYTES);
      return {a.lower + b.lower, a.upper + b.upper};
    }
  }

  static double halved(const Pair& pair) {
    double x[W / 2];
    save(x, pair.lower + pair.upper);
    for (int n = W / 4; n; n /= 2)
      for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
  }

  static constexpr int CHUNKS = BLOCK / LANES;
};

template <class... C>
Kernel* squares_of(const Request& r, const Codec* const (&codecs)[MAX_SLOTS], List<C...>) {
  Kernel* kernel = nullptr;
  (void)((!std::strcmp(r.formats[0], C::name.text) && (kernel = new Squares<C>(codecs))) || ...);
  return kernel;
}

}  // namespace
}  // namespace collage
