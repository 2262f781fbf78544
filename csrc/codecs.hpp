// Every format's operations on a stage of elements, looked up by name.
#pragma once
#include "formats.hpp"
#include "sums.hpp"

namespace collage {
namespace {

struct Codec {
  const Format* format;
  Kind kind;        // of its numbers in bfloat16 arithmetic
  bool expanded;    // in float32 arithmetic they have several components, not one register

  void (*values)(PlanesAt, int count, Buffer&);
  void (*decode)(PlanesAt, int count, Parted&);
  void (*encode)(PlanesAt, int count, const Parted& numbers, const uint32_t* random);
  void (*encode_parts)(PlanesAt, int count, const Parted& parts, const uint32_t* random);
  void (*measure)(const Parted& old, const Parted& fresh, const Buffer& delta, int count, int at, Sums&);
  int64_t (*broken)(PlanesAt, int count);
  // Where a row has a scale, else null: what decides it, for `encode` to be given; and that of numbers in other buffers.
  void (*fit)(char* scale, uint32_t largest);
  void (*encode_numbers)(PlanesAt, int count, const float* numbers, const uint32_t* random);
};

template <class F>
using NumberOf = decltype(F::number(Lanes<F::lanes>{}));

template <class F>
constexpr bool is_expanded = !std::is_same_v<NumberOf<F>, Register<F32>>;

// Of the components, each in float64, the last one first; or of the number, where it is one register.
template <class F, int part>
inline F64 difference(const Lanes<F::lanes>& from, const Lanes<F::lanes>& to) {
  F64 sum{};
  if constexpr (is_expanded<F>)
    for (int p = F::lanes - 1; p >= 0; --p) sum += wide<part>(to.x[p]) - wide<part>(from.x[p]);
  else
    sum += wide<part>(F::number(to).x) - wide<part>(F::number(from).x);
  return sum;
}

// What became of the intended updates of theta: of a block's elements `at` and on.
template <class F>
void measure(const Parted& old, const Parted& fresh, const Buffer& intended, int count, int at, Sums& sums) {
  for (int i = 0; i < padded(count); i += W) {
    const auto from = lanes_at<F>(old, i), to = lanes_at<F>(fresh, i);
    const F32 delta = load<F32>(intended + i);
    const F32 was = F::visible(from), is = F::visible(to);
    sums.count(delta != F32{}, F::moved(from, to));
    sums.add(at + i, wide<0>(delta), difference<F, 0>(from, to), wide<0>(is) - wide<0>(was));
    sums.add(at + i + W / 2, wide<1>(delta), difference<F, 1>(from, to), wide<1>(is) - wide<1>(was));
  }
}

// How many elements have planes that no step could have left.
template <class F>
int64_t broken(PlanesAt planes, int count) {
  Parted x;
  F::decode(planes, count, x);
  Mask found{};  // a set lane is -1; a padded one is 0 in every plane, which belong together
  for (int i = 0; i < padded(count); i += W) found += F::broken(lanes_at<F>(x, i));
  int64_t total = 0;
  for (int k = 0; k < W; ++k) total -= found[k];
  return total;
}

template <class F>
void fit(char* scale, uint32_t largest) {
  *reinterpret_cast<typename F::Word*>(scale) = F::scale_of(largest);
}

template <class F>
constexpr Codec codec_of() {
  Codec codec{&F::format, F::kind, is_expanded<F>, F::values, F::decode, F::template encode<Register<F32>>, nullptr,
              measure<F>, broken<F>, nullptr, nullptr};
  if constexpr (has_rows(F::format)) codec.fit = fit<F>, codec.encode_numbers = F::encode_numbers;
  if constexpr (is_expanded<F>) codec.encode_parts = F::template encode<Expanded<typename F::Component, 2>>;
  return codec;
}

template <class F>
constexpr Codec codec = codec_of<F>();

template <class... F>
const Codec* codec_named(const char* name, List<F...>) {
  const Codec* found = nullptr;
  (void)((!std::strcmp(name, F::format.name) && (found = &codec<F>)) || ...);
  return found;
}

}  // namespace
}  // namespace collage
