// The monitor's sums over one block, in the order that reference.py fixes: halving pairwise, x[:half] + x[half:].
#pragma once
#include "kernel.hpp"
#include "simd.hpp"

namespace collage {
namespace {

class Sums {
 public:
  explicit Sums(int64_t count) {
    if (count < BLOCK) std::memset(terms_, 0, sizeof terms_);
  }

  // Half a vector of the block's elements, from place i of their order in lanes on. What was intended, what arrived of
  // it, and what the forward pass sees of that.
  void add(int i, F64 intended, F64 arrived, F64 visible) {
    double* const at = terms_[0] + i % HALF;
    const F64 terms[] = {intended * arrived, intended * visible, intended * intended};
    for (int k = 0; k < 3; ++k) save(at + k * HALF, i < HALF ? terms[k] : load<F64>(at + k * HALF) + terms[k]);
  }

  void count(Mask nonzero, Mask moved) {
    nonzero_ -= nonzero;  // a set lane is -1
    lost_ -= nonzero & ~moved;
  }

  void finish(double* sums) {
    for (int k = 0; k < 3; ++k) {
      double* const x = terms_[k];
      int half = HALF / 2;
      for (; half >= LANES; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
      for (half = W / 2; half; half /= 2)  // inside a chunk even and odd elements stand apart
        for (int i = 0; i < half; ++i) x[i] += x[i + half], x[W + i] += x[W + i + half];
      sums[k] = x[0] + x[W];
    }
    sums[3] = sums[4] = 0.0;
    for (int i = 0; i < W; ++i) {
      sums[3] += nonzero_[i];
      sums[4] += lost_[i];
    }
  }

 private:
  static constexpr int HALF = BLOCK / 2;

  alignas(64) double terms_[3][HALF];  // of a block's first half, to which those of its second are added
  Mask nonzero_{}, lost_{};
};

}  // namespace
}  // namespace collage
