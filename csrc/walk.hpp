// The one walk: all rules, formats and sizes go through it. A block is 1,024 elements; a chunk is LANES of them.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "any.hpp"
#include "sums.hpp"

// A block is one function, in which vectors stay in registers. (Sanitized builds would take minutes for that.)
#if defined(__SANITIZE_ADDRESS__)
#define ALWAYS_INLINE inline
#define FLATTEN
#else
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define FLATTEN __attribute__((flatten))
#endif

namespace collage {
namespace {

// Elements that cannot be walked in place, the tail of a tensor or all of one with strides, copied to contiguous
// memory, padded to whole chunks, and written back.
class Copy {
 public:
  Copy(const Tensor& t, const int (&bytes)[MAX_SLOTS][MAX_PLANES], int gradient_bytes, int64_t begin, int count)
      : t_(t), bytes_(bytes), begin_(begin), count_(count) {
    for (int s = 0; s < MAX_SLOTS; ++s)
      for (int p = 0; p < MAX_PLANES; ++p) {
        planes[s][p] = memory_[s * MAX_PLANES + p];
        if (bytes[s][p]) gather(planes[s][p], t.planes[s][p], bytes[s][p], strides(s, p));
      }
    if (gradient_bytes)
      gather(memory_[MAX_SLOTS * MAX_PLANES], t.gradient, gradient_bytes, t.layout ? t.layout->gradient : nullptr);
    gradient = memory_[MAX_SLOTS * MAX_PLANES];
  }

  void write_back() const {
    for (int s = 0; s < MAX_SLOTS; ++s)
      for (int p = 0; p < MAX_PLANES; ++p)
        if (bytes_[s][p]) scatter(t_.planes[s][p], planes[s][p], bytes_[s][p], strides(s, p));
  }

  char* planes[MAX_SLOTS][MAX_PLANES];
  const char* gradient;

 private:
  const int64_t* strides(int s, int p) const { return t_.layout ? t_.layout->planes[s][p] : nullptr; }

  template <class Fn>  // fn(offset in elements, how many follow each other there)
  void runs(const int64_t* strides, Fn fn) const {
    if (!strides) return fn(begin_, count_);
    for (int64_t i = begin_; i < begin_ + count_; ++i) {
      int64_t rest = i, offset = 0;
      for (int d = t_.layout->dims - 1; d >= 0; --d) {
        offset += rest % t_.layout->sizes[d] * strides[d];
        rest /= t_.layout->sizes[d];
      }
      fn(offset, 1);
    }
  }

  void gather(char* to, const char* from, int bytes, const int64_t* strides) const {
    char* const end = to + int64_t(count_ + LANES) * bytes;
    runs(strides, [&](int64_t offset, int64_t n) {
      std::memcpy(to, from + offset * bytes, n * bytes);
      to += n * bytes;
    });
    std::memset(to, 0, end - to);
  }

  void scatter(char* to, const char* from, int bytes, const int64_t* strides) const {
    runs(strides, [&](int64_t offset, int64_t n) {
      std::memcpy(to + offset * bytes, from, n * bytes);
      from += n * bytes;
    });
  }

  const Tensor& t_;
  const int (&bytes_)[MAX_SLOTS][MAX_PLANES];
  int64_t begin_;
  int count_;
  alignas(64) char memory_[MAX_SLOTS * MAX_PLANES + 1][(BLOCK + LANES) * 4];
};

template <class Rule, class N, class Gradient, class... Formats>
class Walk final : public Kernel {
 public:
  explicit Walk(Gradient gradient, Formats... formats)
      : gradient_(gradient), formats_(formats...), stochastic_((formats.code.stochastic || ...)) {
    int slot = 0;
    ((bytes_[slot][0] = formats.code.bytes(0), bytes_[slot++][1] = formats.code.bytes(1)), ...);
    for (int p = 0; p < MAX_PLANES; ++p) theta_bytes_[0][p] = bytes_[0][p];
    gradient_bytes_ = gradient.code.bytes(0);
  }

  void run(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    const Constants constants(t.constants);
    for (int64_t b = first_block; b < end_block; ++b)
      t.sums ? block<true>(t, b, constants) : block<false>(t, b, constants);
  }

  int64_t broken(const Tensor& t, int64_t first_block, int64_t end_block) const override {
    int64_t total = 0;
    for (int64_t b = first_block; b < end_block; ++b) {
      const int64_t begin = b * BLOCK;
      const int count = int(t.numel - begin < BLOCK ? t.numel - begin : BLOCK);
      const int direct = t.layout ? 0 : count / LANES * LANES;
      Mask found{};  // a set lane is -1; a padded one is 0 in every plane, which belong together
      for (int i = 0; i < direct; i += LANES) found += broken_at(t.planes[0], begin + i);
      if (direct < count) {
        const Copy copy(t, theta_bytes_, 0, begin + direct, count - direct);
        for (int i = 0; i < count - direct; i += LANES) found += broken_at(copy.planes[0], i);
      }
      for (int k = 0; k < W; ++k) total -= found[k];
    }
    return total;
  }

 private:
  using Constants = typename Rule::template Constants<N>;
  using Slots = std::index_sequence_for<Formats...>;
  struct Nothing {
    Nothing(const Tensor&, int64_t, int) {}
  };
  template <bool wanted, class T>
  using If = std::conditional_t<wanted, T, Nothing>;
  using Noise = If<(Formats::random || ...), Random>;

  template <bool measured>
  FLATTEN void block(const Tensor& t, int64_t b, const Constants& constants) const {
    const int64_t begin = b * BLOCK;
    const int count = int(t.numel - begin < BLOCK ? t.numel - begin : BLOCK);
    const int direct = t.layout ? 0 : count / LANES * LANES;
    If<measured, Sums> sums(t, begin, count);
    Noise noise(t, begin, count);
    const auto chunks = [&](char* const (*planes)[MAX_PLANES], const char* gradient, int64_t at, int first, int end) {
      for (int i = first; i < end; i += LANES, at += LANES)
        if (__builtin_expect(!chunk<true>(planes, gradient, at, i, t.maximize, constants, noise, sums, Slots{}), false))
          again(planes, gradient, at, i, t.maximize, constants, noise, sums);
    };
    chunks(t.planes, t.gradient, begin, 0, direct);
    if (direct < count) {
      Copy tail(t, bytes_, gradient_bytes_, begin + direct, count - direct);
      chunks(tail.planes, tail.gradient, 0, direct, count);
      tail.write_back();
    }
    if constexpr (measured) sums.finish(t.sums + b * SUMS);
  }

  ALWAYS_INLINE Mask broken_at(char* const* theta, int64_t at) const {
    const auto& format = std::get<0>(formats_);
    return format.broken(format.template read<0>(theta, at)) + format.broken(format.template read<1>(theta, at));
  }

  // One half of a chunk once it is computed.
  struct Half {
    F32 delta, whole;
    Planes theta, fresh[sizeof...(Formats)];
  };

  template <int half, bool is_finite, size_t... K>
  ALWAYS_INLINE Half compute(char* const (*planes)[MAX_PLANES], const char* gradient, int64_t at, int i,
                             bool maximize, const Constants& constants, Noise& noise,
                             std::index_sequence<K...>) const {
    const Planes old[] = {std::get<K>(formats_).template read<half>(planes[K], at)...};
    const char* const gradients[MAX_PLANES] = {gradient, gradient};
    const F32 raw = gradient_.template read<half>(gradients, at).hi;
    U32 word{};
    if constexpr (std::is_same_v<Noise, Random>)
      if (stochastic_) word = noise.words(i, half);
    return Rule::update(in_register<N>(maximize ? -raw : raw), constants,
                        std::get<K>(formats_).template number<N>(old[K])..., [&](N delta, auto... numbers) {
                          return Half{to_float(delta), (std::get<K>(formats_).whole(numbers) + ...), old[0],
                                      {std::get<K>(formats_).encode(numbers, word, int(K), Finite<is_finite>{})...}};
                        });
  }

  // A block's elements i and on, which lie at `at` in memory. False, and nothing written, if it was called for finite
  // numbers and has met another.
  template <bool is_finite, class S, size_t... K>
  ALWAYS_INLINE bool chunk(char* const (*planes)[MAX_PLANES], const char* gradient, int64_t at, int i, bool maximize,
                           const Constants& constants, Noise& noise, S& sums, std::index_sequence<K...> slots) const {
    const Half even = compute<0, is_finite>(planes, gradient, at, i, maximize, constants, noise, slots);
    const Half odd = compute<1, is_finite>(planes, gradient, at, i, maximize, constants, noise, slots);
    if (is_finite && !all(finite(even.whole + odd.whole))) return false;
    if constexpr (std::is_same_v<S, Sums>) {
      add(sums, i, 0, even);
      add(sums, i, 1, odd);
    }
    (std::get<K>(formats_).write(planes[K], at, even.fresh[K], odd.fresh[K]), ...);
    return true;
  }

  ALWAYS_INLINE void add(Sums& sums, int i, int half, const Half& x) const {
    const auto& format = std::get<0>(formats_);
    Planes values = format.values(x.fresh[0]);
    F32 delta = x.delta;
    if (__builtin_expect(sums.padded(i), false)) {
      const Mask real = sums.real(i + half);
      values = {keep(real, values.hi), keep(real, values.lo)};  // as theta, which is padded with 0
      delta = keep(real, delta);
    }
    sums.count(delta != F32{}, format.moved(x.theta, values));
    sums.add(i, 2 * half, wide<0>(delta), format.template difference<0>(x.theta, values),
             wide<0>(values.hi) - wide<0>(x.theta.hi));
    sums.add(i, 2 * half + 1, wide<1>(delta), format.template difference<1>(x.theta, values),
             wide<1>(values.hi) - wide<1>(x.theta.hi));
  }

  // The rare chunk that holds NaN or Inf.
  template <class S>
  __attribute__((noinline)) FLATTEN void again(char* const (*planes)[MAX_PLANES], const char* gradient, int64_t at,
                                             int i, bool maximize, const Constants& constants, Noise& noise,
                                             S& sums) const {
    chunk<false>(planes, gradient, at, i, maximize, constants, noise, sums, Slots{});
  }

  Gradient gradient_;
  std::tuple<Formats...> formats_;
  bool stochastic_;
  int bytes_[MAX_SLOTS][MAX_PLANES]{};
  int theta_bytes_[MAX_SLOTS][MAX_PLANES]{};  // theta's alone
  int gradient_bytes_;
};

}  // namespace
}  // namespace collage
