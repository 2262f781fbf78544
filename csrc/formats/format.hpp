// What a format says of itself.
#pragma once
#include "../components.hpp"
#include "../kernel.hpp"

namespace collage {
namespace {

constexpr Format described(const Name& name, bool stochastic, int count, Plane a, Plane b = {}, Plane c = {}) {
  Format format{{}, stochastic, count, {a, b, c}};
  for (int k = 0; k < int(sizeof name.text); ++k) format.name[k] = name.text[k];
  return format;
}

template <class C>
constexpr Plane plane_of{C::BYTES, 1};

constexpr const char* suffix(bool stochastic) { return stochastic ? ":sr" : ""; }

}  // namespace
}  // namespace collage
