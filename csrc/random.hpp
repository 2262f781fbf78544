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
template <class U>
inline U bits_of(U word, int part) {
  return part == 0 ? word & 0xFFFF : part == 1 ? word >> 16 : (word * 0x9E3779B1) >> 16;
}

// The words of consecutive local elements.
class Random {
 public:
  Random(const Tensor& tensor, uint64_t salt, int64_t begin, int count)
      : region_(tensor.region), base_(salt ? mix64(tensor.stream ^ salt) : tensor.stream), begin_(begin), count_(count) {
    use_keys(global(begin) >> 32);
  }

  // One per element, chunk by chunk: first those at even places, then those at odd ones.
  void words(uint32_t* to) {
    const uint64_t first = global(begin_), last = global(begin_ + count_ - 1);
    const bool one_run = last - first == uint64_t(count_ - 1) && first >> 32 == (first + count_ + LANES) >> 32;
    if (!one_run) return scattered(to);
    const uint32_t key0 = key0_, key1 = key1_;
    U32 even = uint32_t(first) + U32{};
    for (int k = 0; k < W; ++k) even[k] += 2 * k;
    for (int i = 0; i < count_; i += LANES, even += LANES) {
      save(to + i, mix32(even, key0, key1));
      save(to + i + W, mix32(even + 1, key0, key1));
    }
  }

 private:
  void scattered(uint32_t* to) {
    for (int i = 0; i < padded(count_); ++i) to[place_of(i)] = word(global(begin_ + i));
  }

  // Row-major index in the unsharded tensor.
  uint64_t global(int64_t local) const {
    if (!region_) return local;
    int64_t index = 0;
    for (int d = region_->dims - 1; d >= 0; --d) {
      index += (region_->starts[d] + local % region_->sizes[d]) * region_->strides[d];
      local /= region_->sizes[d];
    }
    return index;
  }

  void use_keys(uint64_t high) {
    const uint64_t mixed = mix64(base_ ^ high);
    key0_ = uint32_t(mixed);
    key1_ = uint32_t(mixed >> 32);
    high_ = high;
  }

  uint32_t word(uint64_t index) {
    if (index >> 32 != high_) use_keys(index >> 32);
    return mix32(uint32_t(index), key0_, key1_);
  }

  const Region* region_;
  uint64_t base_;
  int64_t begin_;
  int count_;
  uint64_t high_ = 0;
  uint32_t key0_ = 0, key1_ = 0;
};

}  // namespace
}  // namespace collage
