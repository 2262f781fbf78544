// The kernels of one instruction set: compiled once per instruction set, with its flags and names (CMakeLists.txt).
#include "rows.hpp"
#include "squares.hpp"
#include "stream.hpp"

namespace collage {
namespace {

using Codecs = const Codec* [MAX_SLOTS];

template <class Rule>
Kernel* step_of(const Request& r, const Codecs& codecs, const Codec* gradient, Rule rule) {
  for (int s = 0; s < rule.writes; ++s)
    if (codecs[s]->fit) return new StepInRows(r, codecs, gradient, rule);
  return new Step(r, codecs, gradient, rule);
}

template <class... R>
Kernel* step_of(const Request& r, const Codecs& codecs, const Codec* gradient, RuleList<R...>) {
  Kernel* kernel = nullptr;
  const auto fits = [&](auto rule) {
    return !std::strcmp(r.operation, rule.name) && r.slots == std::max(rule.reads, rule.writes) &&
           rule.gradient == (gradient != nullptr);
  };
  (void)((fits(R{}) && (kernel = step_of(r, codecs, gradient, R{}))) || ...);
  return kernel;
}

Kernel* make(const Request& r) {
  const auto is = [&](const char* name, int slots) { return !std::strcmp(r.operation, name) && r.slots == slots; };
  Codecs codecs{};
  for (int s = 0; s < r.slots; ++s)
    if (!(codecs[s] = codec_named(r.formats[s], Formats{}))) return nullptr;
  const Codec* const gradient = r.gradient ? codec_named(r.gradient, Formats{}) : nullptr;
  if (r.gradient && (!gradient || gradient->format->count != 1)) return nullptr;
  if (is("decode", 2)) return new Decode(codecs);
  if (is("encode", 1) && gradient) return new Encode(codecs, gradient, {r.salts[0], r.parts[0]});
  if (is("broken", 1)) return new Broken(codecs);
  if (is("squares", 1)) return squares_of(r, codecs, List<FP32, BF16, FP16>{});
  if (is("stream", r.slots)) return new Stream(codecs, r.slots, gradient);
  return step_of(r, codecs, gradient, Rules{});
}

}  // namespace

extern const InstructionSet COLLAGE_ISA;
const InstructionSet COLLAGE_ISA{make};

}  // namespace collage
