// The strategies that get a kernel of their own: the rows of strategies.py. Any other combination runs on `Any`.
#pragma once
#include "walk.hpp"

namespace collage {
namespace {

template <class N, class Theta, class M, class V>
struct Row {};

template <class... Rows>
struct Table {};

using Strategies = Table<                                                   //
    Row<F32, Single<BF16>, Single<BF16>, Single<BF16>>,                     // bf16
    Row<F32, Pair<>, Single<BF16>, Single<BF16>>,                           // collage-light
    Row<F32, Pair<>, Single<BF16>, Pair<>>,                                 // collage-plus
    Row<F32, Pair<true>, Single<BF16, true>, Pair<true>>,                   // collage-plus-sr
    Row<B16, Single<BF16>, Single<BF16>, Single<BF16>>,                     // paper-bf16
    Row<B16, Pair<>, Single<BF16>, Single<BF16>>,                           // paper-light
    Row<B16, Pair<>, Single<BF16>, Pair<>>,                                 // paper-plus
    Row<F32, Single<BF16>, Single<FP32>, Single<FP32>>,                     // fp32-states
    Row<F32, Master, Single<FP32>, Single<FP32>>,                           // fp32-master
    Row<F32, Single<FP32>, Single<FP32>, Single<FP32>>,                     // fp32
    Row<B16, Compensated, Single<BF16>, Single<BF16>>,                      // kahan
    Row<F32, Single<BF16, true>, Single<BF16, true>, Single<BF16, true>>>;  // stochastic

template <class Rule, class N, class... Formats>
Kernel* with_gradient(const Request& request, Formats... formats) {
  if (request.gradient == Code::bf16) return new Walk<Rule, N, Single<BF16>, Formats...>({}, formats...);
  if (request.gradient == Code::fp32) return new Walk<Rule, N, Single<FP32>, Formats...>({}, formats...);
  return nullptr;
}

template <class Rule, class N, class Theta, class M, class V>
Kernel* of_row(const Request& r, Row<N, Theta, M, V>) {
  const bool same = r.bfloat16_arithmetic == std::is_same_v<N, B16> && r.slots[0] == Theta::code &&
                    r.slots[1] == M::code && r.slots[2] == V::code;
  return same ? with_gradient<Rule, N>(r, Theta{}, M{}, V{}) : nullptr;
}

template <class Rule, class... Rows>
Kernel* of_table(const Request& request, Table<Rows...>) {
  Kernel* kernel = nullptr;
  (void)((kernel = of_row<Rule>(request, Rows{})) || ...);
  return kernel;
}

template <class Rule>
Kernel* make(const Request& r) {
  if (Kernel* kernel = of_table<Rule>(r, Strategies{})) return kernel;
  const Any gradient{{Code::single, r.gradient, false}}, theta{r.slots[0]}, m{r.slots[1]}, v{r.slots[2]};
  if (r.bfloat16_arithmetic) return new Walk<Rule, B16, Any, Any, Any, Any>(gradient, theta, m, v);
  return new Walk<Rule, F32, Any, Any, Any, Any>(gradient, theta, m, v);
}

}  // namespace
}  // namespace collage
