// The rules: each is one struct in rules/ and one entry here.
#pragma once
#include "rules/accumulate.hpp"
#include "rules/adam.hpp"
#include "rules/adamw.hpp"
#include "rules/apply.hpp"
#include "rules/assign.hpp"
#include "rules/average.hpp"
#include "rules/lion.hpp"
#include "rules/momentum.hpp"
#include "rules/sgd.hpp"

namespace collage {
namespace {

template <class... R>
struct RuleList {};

using Rules = RuleList<AdamW, AdamWAmsgrad, Adam, AdamAmsgrad, Sgd, SgdMomentum, SgdNesterov, Lion, Average, Accumulate,
                       Momentum, MomentumNesterov, Apply, Assign>;

}  // namespace
}  // namespace collage
