// Planes in memory <-> numbers in registers. One for one what formats/*.py say: a format is one struct in formats/ and one
// row of this list. Decoded, an element has `lanes`: those of its own words, the visible one first, and what its block has.
#pragma once
#include "formats/blocks.hpp"
#include "formats/floats.hpp"
#include "formats/words.hpp"

namespace collage {
namespace {

template <class... F>
struct List {};

using Formats = List<Single<FP32>, Single<BF16>, Single<FP16>, Single<BF16, true>, Single<FP16, true>,                  //
                     Expansion<BF16>, Expansion<BF16, 3>, Expansion<FP16>,                                              //
                     Expansion<BF16, 2, true>, Expansion<BF16, 3, true>, Expansion<FP16, 2, true>,                      //
                     Master<BF16>, Master<FP16>, ScaledMaster, Compensated,                                             //
                     Cut<Int16>, Cut<Int8>, Cut<Int8, true>, Word<Int8>, Word<Int8, true>,                              //
                     ScaledWord<Int16>, ScaledWord<Int16, true>, ScaledWord<Int8>, ScaledWord<Int8, true>,              //
                     Companded<Int8>, Companded<Int8, true>, Companded<Integer<uint8_t>>, Companded<Integer<uint8_t>, true>>;

}  // namespace
}  // namespace collage
