// The physical limit of a step: read and write the same planes, without arithmetic. For `collage bench`.
#pragma once
#include "kernel.hpp"
#include "simd.hpp"

namespace collage {
namespace {

// zero is 0, but no compiler knows: every plane comes back as it was, and depends on the gradient having been read.
inline void stream(const Tensor& t, const int (&bytes)[MAX_SLOTS][MAX_PLANES], int gradient_bytes, uint32_t zero,
                   int64_t first_block, int64_t end_block) {
  for (int64_t i = first_block * BLOCK; i + LANES <= end_block * BLOCK && i + LANES <= t.numel; i += LANES) {
    U32 g{};
    for (int k = 0; k < LANES * gradient_bytes; k += sizeof g) g |= load<U32>(t.gradient + i * gradient_bytes + k);
    g &= zero;
    for (int s = 0; s < MAX_SLOTS; ++s)
      for (int p = 0; p < MAX_PLANES; ++p)
        for (int k = 0; k < LANES * bytes[s][p]; k += sizeof g) {
          char* const at = t.planes[s][p] + i * bytes[s][p] + k;
          save(at, load<U32>(at) | g);
        }
  }
}

}  // namespace
}  // namespace collage
