// The one walk: all operations, formats, strides and sizes go through it, block by block.
#pragma once
#include <algorithm>

#include "elementwise.hpp"
#include "kernel.hpp"

namespace collage {
namespace {

// Elements of one row that follow each other in memory, in whole chunks of LANES.
struct Piece {
  char* planes[MAX_SLOTS][MAX_PLANES];
  const char* gradient;
  int64_t begin;  // of the first, row-major in the tensor
  int count;      // without those that only fill the last chunk
};

// Which planes a kernel has, slot by slot.
struct Shape {
  explicit Shape(const Kernel& kernel) : slots(kernel.slots), gradient_bytes(0) {
    for (int s = 0; s < slots; ++s) {
      formats[s] = kernel.formats[s];
      writes[s] = kernel.writes[s];
      for (int p = 0; p < formats[s]->count; ++p) blocked |= formats[s]->planes[p].per != 1;
    }
    if (kernel.gradient) gradient_bytes = kernel.gradient->planes[0].bytes;
  }

  template <class Fn>  // fn(slot, plane's number, plane)
  void each_plane(Fn fn) const {
    for (int s = 0; s < slots; ++s)
      for (int p = 0; p < formats[s]->count; ++p) fn(s, p, formats[s]->planes[p]);
  }

  int slots, gradient_bytes;
  const Format* formats[MAX_SLOTS];
  bool writes[MAX_SLOTS], blocked = false;
};

// Elements that cannot be walked in place, the tail of a row or all of a tensor with strides, copied to contiguous
// memory, padded with zeros to whole chunks, and written back.
class Copy {
 public:
  Copy(const Tensor& t, const Shape& shape, const Piece& original)
      : piece(original), t_(t), shape_(shape), original_(original) {
    each([&](int s, int p, int bytes, char* at, const int64_t* strides) {
      gather(piece.planes[s][p] = memory_[s * MAX_PLANES + p], at, bytes, strides);
    });
    if (!shape.gradient_bytes) return;
    piece.gradient = memory_[MAX_SLOTS * MAX_PLANES];
    gather(memory_[MAX_SLOTS * MAX_PLANES], t.layout ? t.gradient : original.gradient, shape.gradient_bytes, strides_);
  }

  void write_back() {
    each([&](int s, int p, int bytes, char* at, const int64_t* strides) {
      if (shape_.writes[s]) scatter(at, piece.planes[s][p], bytes, strides);
    });
  }

  Piece piece;

 private:
  template <class Fn>  // fn(slot, plane, bytes, address, strides or null) of planes with a word per element
  void each(Fn fn) {
    strides_ = t_.layout ? t_.layout->strides : nullptr;
    shape_.each_plane([&](int s, int p, const Plane& plane) {
      if (plane.per != 1) return;
      fn(s, p, plane.bytes, strides_ ? t_.planes[s][p] : original_.planes[s][p], strides_);
      if (strides_) strides_ += t_.layout->dims;
    });
  }

  template <class Fn>  // fn(offset in elements, how many are there, their stride)
  void runs(const int64_t* strides, Fn fn) const {
    if (!strides) return fn(0, original_.count, 1);
    const int last = t_.layout->dims - 1;
    for (int64_t i = original_.begin, end = i + original_.count, n; i < end; i += n) {
      int64_t rest = i, offset = 0;
      for (int d = last; d >= 0; --d) {
        const int64_t size = t_.layout->sizes[d];
        offset += rest % size * strides[d];
        if (d == last) n = std::min(size - rest % size, end - i);
        rest /= size;
      }
      fn(offset, n, strides[last]);
    }
  }

  void gather(char* to, const char* from, int bytes, const int64_t* strides) const {
    char* const end = to + padded(original_.count) * bytes;
    runs(strides, [&](int64_t offset, int64_t n, int64_t stride) {
      move(to, 1, from + offset * bytes, stride, n, bytes);
      to += n * bytes;
    });
    std::memset(to, 0, end - to);
  }

  void scatter(char* to, const char* from, int bytes, const int64_t* strides) const {
    runs(strides, [&](int64_t offset, int64_t n, int64_t stride) {
      move(to + offset * bytes, stride, from, 1, n, bytes);
      from += n * bytes;
    });
  }

  // n words, so many words apart.
  static void move(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n, int bytes) {
    if (to_stride == 1 && from_stride == 1)
      std::memcpy(to, from, n * bytes);
    else if (bytes == 4)
      move_words<4>(to, 4 * to_stride, from, 4 * from_stride, n);
    else if (bytes == 2)
      move_words<2>(to, 2 * to_stride, from, 2 * from_stride, n);
    else
      move_words<1>(to, to_stride, from, from_stride, n);
  }

  template <int bytes>
  static void move_words(char* to, int64_t to_step, const char* from, int64_t from_step, int64_t n) {
    for (; n > 0; --n, to += to_step, from += from_step) std::memcpy(to, from, bytes);
  }

  const Tensor& t_;
  const Shape& shape_;
  const Piece original_;
  const int64_t* strides_;
  alignas(64) char memory_[MAX_SLOTS * MAX_PLANES + 1][STAGE * 4];
};

// The elements `at` and on, `count` of them, of a row.
inline Piece piece_at(const Tensor& t, const Shape& shape, int64_t row, int64_t at, int count) {
  Piece piece{{}, nullptr, row * t.columns + at, count};
  shape.each_plane([&](int s, int p, const Plane& plane) {
    const int64_t index = plane.per == 1         ? piece.begin
                          : plane.per == PER_ROW ? row
                                                 : row * ((t.columns + plane.per - 1) / plane.per) + at / plane.per;
    piece.planes[s][p] = t.planes[s][p] + index * plane.bytes;
  });
  piece.gradient = t.gradient + piece.begin * shape.gradient_bytes;
  return piece;
}

inline int block_size(const Tensor& t, int64_t block) {
  return int(std::min<int64_t>(BLOCK, t.columns - block % blocks_in_row(t.columns) * BLOCK));
}

// fn(piece, first element in the block) for all pieces of a block. A format's own blocks are never divided.
template <class Fn>
inline void walk(const Tensor& t, const Shape& shape, int64_t block, Fn fn) {
  const int64_t in_row = blocks_in_row(t.columns), row = block / in_row, first = block % in_row * BLOCK;
  const int count = block_size(t, block), unit = shape.blocked ? STAGE : LANES;
  const int direct = t.layout ? 0 : count % LANES == 0 ? count : count / unit * unit;
  if (direct) fn(piece_at(t, shape, row, first, direct), 0);
  for (int at = direct; at < count; at += STAGE) {
    Copy copy(t, shape, piece_at(t, shape, row, first + at, std::min(STAGE, count - at)));
    fn(copy.piece, at);
    copy.write_back();
  }
}

// fn(row, its blocks' first and end) for the rows whose first block is one of these.
template <class Fn>
inline void each_row(const Tensor& t, int64_t first_block, int64_t end_block, Fn fn) {
  const int64_t in_row = blocks_in_row(t.columns);
  for (int64_t row = (first_block + in_row - 1) / in_row; row * in_row < end_block; ++row)
    fn(row, row * in_row, (row + 1) * in_row);
}

// The elements `at` and on of a piece: at most a stage.
inline Piece stage_of(const Piece& whole, const Shape& shape, int at) {
  Piece piece{{}, whole.gradient + at * shape.gradient_bytes, whole.begin + at, std::min(STAGE, whole.count - at)};
  shape.each_plane([&](int s, int p, const Plane& plane) {
    piece.planes[s][p] = whole.planes[s][p] + (plane.per == PER_ROW ? 0 : at / plane.per * plane.bytes);
  });
  return piece;
}

}  // namespace
}  // namespace collage
