// The rules: each is one file and one entry here.
#pragma once
#include "rules/adamw.hpp"

namespace collage {
namespace {

template <class... R>
struct RuleList {};

using Rules = RuleList<AdamW>;

}  // namespace
}  // namespace collage
