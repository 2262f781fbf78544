// Counter-based random bits for stochastic rounding: the definition is rng.py.
#pragma once
#include "kernel.hpp"
#include "simd.hpp"

namespace collage {
namespace {

inline uint64_t mix64(uint64_t z) {  // the finaliser of SplitMix64
  z += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

template <class U>
inline U mix32(U x, uint32_t key0, uint32_t key1) {  // three keyed rounds of multiply and xor-shift
  x = (x ^ key0) * 0xED5AD4BB;
  x = ((x ^ (x >> 16)) ^ key1) * 0xAC4C1B51;
  x = (x ^ (x >> 15)) * 0x31848BAB;
  return x ^ (x >> 16);
}

// 16 bits for one of the slots out of an element's word.
inline U32 bits_of(U32 word, int slot) {
  return slot == 0 ? word & 0xFFFF : slot == 1 ? word >> 16 : (word * 0x9E3779B1) >> 16;
}

// The words of one block of consecutive local elements.
class Random {
 public:
  Random(const Tensor& tensor, int64_t begin, int64_t count) : tensor_(tensor), begin_(begin), first_(global(begin)) {
    const uint64_t last = global(begin + count - 1);
    one_run_ = last - first_ == uint64_t(count - 1) && first_ >> 32 == (first_ + count + LANES) >> 32;
    use_keys(first_ >> 32);
  }

  U32 words(int64_t i, int half) {  // of every second element from begin + i + half
    U32 index;
    for (int k = 0; k < W; ++k) index[k] = 2 * k;
    if (one_run_) return mix32(index + uint32_t(first_ + i + half), key0_, key1_);
    for (int k = 0; k < W; ++k) index[k] = word(global(begin_ + i + half + 2 * k));
    return index;
  }

 private:
  // Row-major index in the unsharded tensor.
  uint64_t global(int64_t local) const {
    if (!tensor_.region) return local;
    const Region& r = *tensor_.region;
    int64_t index = 0;
    for (int d = r.dims - 1; d >= 0; --d) {
      index += (r.starts[d] + local % r.sizes[d]) * r.strides[d];
      local /= r.sizes[d];
    }
    return index;
  }

  void use_keys(uint64_t high) {
    const uint64_t mixed = mix64(tensor_.stream ^ high);
    key0_ = uint32_t(mixed);
    key1_ = uint32_t(mixed >> 32);
    high_ = high;
  }

  uint32_t word(uint64_t index) {
    if (index >> 32 != high_) use_keys(index >> 32);
    return mix32(uint32_t(index), key0_, key1_);
  }

  const Tensor& tensor_;
  int64_t begin_;
  uint64_t first_, high_ = 0;
  bool one_run_;
  uint32_t key0_ = 0, key1_ = 0;
};

}  // namespace
}  // namespace collage
