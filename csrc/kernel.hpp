// What the binding and the kernels of every instruction set agree on. Plain data, no templates, no torch.
#pragma once
#include <cstdint>

namespace collage {

constexpr int MAX_SLOTS = 3;   // theta, momentum, variance
constexpr int MAX_PLANES = 2;  // of one slot
constexpr int BLOCK = 1024;  // elements whose sums are taken by pairwise halving
constexpr int MAX_CONSTANTS = 9;  // of a rule, in a row
constexpr int SUMS = 5;      // dot, dot_visible, norm2, nonzero, lost

// A number format: a row of the table in formats.py.
struct Code {
  enum Kind { single, pair, master, compensated } kind;
  enum Component { fp32, bf16, fp16 } component;  // dtype of plane 0
  bool stochastic;

  constexpr int bytes(int plane) const {
    if (plane == 0) return component == fp32 ? 4 : 2;
    return kind == single ? 0 : kind == master ? 4 : 2;
  }

  constexpr bool operator==(const Code& other) const {
    return kind == other.kind && component == other.component && stochastic == other.stochastic;
  }
};

struct Request {
  enum Rule { adamw } rule;
  Code slots[MAX_SLOTS];
  bool bfloat16_arithmetic;
  Code::Component gradient;
};

// Where a shard lies in the unsharded tensor: per dimension its size, first index and the global stride.
struct Region {
  int dims;
  const int64_t *sizes, *starts, *strides;
};

// Strides, in elements, of tensors that are not all contiguous.
struct Layout {
  int dims;
  const int64_t* sizes;
  const int64_t* planes[MAX_SLOTS][MAX_PLANES];
  const int64_t* gradient;
};

// One parameter's share of a step.
struct Tensor {
  int64_t numel;
  char* planes[MAX_SLOTS][MAX_PLANES];
  const char* gradient;
  const float* constants;  // the rule's, in its own order
  uint64_t stream;         // seed, step and parameter, mixed
  const Region* region;    // null: not sharded
  const Layout* layout;    // null: everything is contiguous
  double* sums;            // [blocks][SUMS], or null: not measured
  bool maximize;
};

inline int64_t blocks_of(const Tensor& t) { return (t.numel + BLOCK - 1) / BLOCK; }

// The step of one rule under one strategy and gradient dtype.
struct Kernel {
  virtual ~Kernel() = default;
  virtual void run(const Tensor&, int64_t first_block, int64_t end_block) const = 0;
  // How many elements of theta have planes that no step could have left.
  virtual int64_t broken(const Tensor&, int64_t first_block, int64_t end_block) const = 0;
};

// The kernels that were compiled for one instruction set. The caller owns what `make` returns.
struct InstructionSet {
  Kernel* (*make)(const Request&);
  void (*stream)(const Tensor&, const int (&bytes)[MAX_SLOTS][MAX_PLANES], int gradient_bytes, uint32_t zero,
                 int64_t first_block, int64_t end_block);
};

}  // namespace collage
