// The monitor's sums over one block, in the order that reference.py fixes: halving pairwise, x[:half] + x[half:].
#pragma once
#include "kernel.hpp"
#include "simd.hpp"

namespace collage {
namespace {

class Sums {
 public:
  Sums(const Tensor&, int64_t, int count) : count_(count) {}

  // Every second element from i + half: the intended update, what arrived of it, what the forward pass sees of that,
  // and whether any plane moved.
  void add(int i, int half, F32 delta, F64 arrived, F64 visible, Mask moved) {
    const F64 intended = wide(delta);
    double* const at = terms_[0] + i + half * W;
    save(at, intended * arrived);
    save(at + BLOCK, intended * visible);
    save(at + 2 * BLOCK, intended * intended);
    Mask counted = ~Mask{};
    if (i + LANES > count_)  // the padding of the last chunk counts for nothing
      for (int k = 0; k < W; ++k) counted[k] = -(i + half + 2 * k < count_);
    const Mask nonzero = (delta != F32{}) & counted;
    nonzero_ -= nonzero;  // a set lane is -1
    lost_ -= nonzero & ~moved;
  }

  void finish(double* sums) {
    for (int k = 0; k < 3; ++k) {
      double* x = terms_[k];
      for (int i = count_; i < BLOCK; ++i) x[place(i)] = 0.0;
      int half = BLOCK / 2;
      for (; half >= LANES; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
      for (half = W / 2; half; half /= 2)  // inside a chunk even and odd places stand apart
        for (int i = 0; i < half; ++i) x[i] += x[i + half], x[W + i] += x[W + i + half];
      sums[k] = x[0] + x[W];
    }
    for (int k = 3; k < SUMS; ++k) sums[k] = 0.0;
    for (int i = 0; i < W; ++i) {
      sums[3] += nonzero_[i];
      sums[4] += lost_[i];
    }
  }

 private:
  static int place(int i) { return i / LANES * LANES + (i % LANES) / 2 + (i % 2 ? W : 0); }

  int count_;
  alignas(64) double terms_[3][BLOCK];
  Mask nonzero_{}, lost_{};
};

}  // namespace
}  // namespace collage
