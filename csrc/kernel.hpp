// What the binding and the kernels of every instruction set agree on. Plain data, no templates, no torch.
#pragma once
#include <cstdint>

namespace collage {

constexpr int MAX_SLOTS = 4;   // of a rule
constexpr int MAX_PLANES = 4;  // of one slot
constexpr int BLOCK = 1024;    // elements whose sums are taken by pairwise halving
constexpr int SUMS = 5;        // dot, dot_visible, norm2, nonzero, lost
constexpr int PER_ROW = 0;

// So many elements share a word of so many bytes: 1 has its own, a block of a row has a scale, or a whole row (PER_ROW).
struct Plane {
  int bytes, per;
};

// A number format: the descriptor that Python sends is its name.
struct Format {
  char name[16];
  bool stochastic;
  int count;  // of planes
  Plane planes[MAX_PLANES];
};

constexpr bool has_rows(const Format& format) { return format.planes[format.count - 1].per == PER_ROW; }

// What is to be done to the slots of many tensors: a rule's step, or one of the operations beside it.
struct Request {
  const char* operation;  // the name of a rule; decode, encode, broken, squares, stream
  int slots;
  const char* formats[MAX_SLOTS];
  uint64_t salts[MAX_SLOTS];  // of the slots' random bits
  int parts[MAX_SLOTS];       // of a random word; -1: to nearest
  bool bfloat16_arithmetic;
  const char* gradient;  // a format of one plane, or null: none is read
};

// Where a shard lies in the unsharded tensor: per dimension its size, first index and the global stride.
struct Region {
  int dims;
  const int64_t *sizes, *starts, *strides;
};

// Strides, in elements, of tensors that are not all contiguous: of every plane with a word per element in slot order,
// then of the gradient.
struct Layout {
  int dims;
  const int64_t *sizes, *strides;
};

// One parameter's share of the work.
struct Tensor {
  int64_t numel;
  int64_t columns;  // of a row, that no block crosses: numel, where no plane has words of several elements
  char* planes[MAX_SLOTS][MAX_PLANES];
  const char* gradient;
  const float* constants;  // the rule's, in its own order
  uint64_t stream;         // of random bits: seed, step and parameter, mixed
  const Region* region;    // null: not sharded
  const Layout* layout;    // null: everything is contiguous
  double* sums;            // [blocks][the kernel's sums], or null: not measured
  float scale;             // the gradient is divided by it
  bool maximize;
};

inline int64_t blocks_in_row(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

// Blocks of 1,024 elements; the last one of every row is short.
inline int64_t blocks_of(int64_t numel, int64_t columns) {
  return numel == 0 ? 0 : numel / columns * blocks_in_row(columns);
}

struct Kernel {
  virtual ~Kernel() = default;
  virtual int64_t run(const Tensor&, int64_t first_block, int64_t end_block) const = 0;  // how many elements it counted

  int slots = 0;
  const Format* formats[MAX_SLOTS] = {};
  bool writes[MAX_SLOTS] = {};
  const Format* gradient = nullptr;  // null: none is read
  int constants = 0;                 // of a row
  int sums = SUMS;                   // of a block
};

// The kernels that were compiled for one instruction set. The caller owns what `make` returns; null: there is none.
struct InstructionSet {
  Kernel* (*make)(const Request&);
};

}  // namespace collage
