// What a rule is: its constants, and `update`, which hands the intended update and every slot's new number to `then`.
// (A continuation, because a returned tuple of numbers is kept in memory by GCC, which costs half of the speed.)
#pragma once
#include "../arithmetic.hpp"

namespace collage {
namespace {

template <class N>
inline N constant(float x) {
  if constexpr (std::is_same_v<N, F32>)
    return splat(x);
  else
    return {splat(x)};
}

}  // namespace
}  // namespace collage
