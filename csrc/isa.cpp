// The kernels of one instruction set: compiled once per instruction set, with its flags and names (CMakeLists.txt).
#include "rules/adamw.hpp"
#include "strategies.hpp"
#include "stream.hpp"

namespace collage {
namespace {

Kernel* make_kernel(const Request& request) {
  switch (request.rule) {
    case Request::adamw:
      return make<AdamW>(request);
  }
  return nullptr;
}

}  // namespace

extern const InstructionSet COLLAGE_ISA;
const InstructionSet COLLAGE_ISA{make_kernel, stream};

}  // namespace collage
