// A format that is chosen at run time: for the strategies that have no row in strategies.hpp.
#pragma once
#include <variant>

#include "formats.hpp"

namespace collage {
namespace {

// fn on the format of that code.
template <class Fn>
inline auto visit(const Code& code, Fn fn) {
  if (code == Single<FP32>::code) return fn(Single<FP32>{});
  if (code == Single<BF16>::code) return fn(Single<BF16>{});
  if (code == Single<FP16>::code) return fn(Single<FP16>{});
  if (code == Single<BF16, true>::code) return fn(Single<BF16, true>{});
  if (code == Pair<>::code) return fn(Pair<>{});
  if (code == Pair<true>::code) return fn(Pair<true>{});
  if (code == Master::code) return fn(Master{});
  return fn(Compensated{});
}

template <class N>
struct AnyNumber {
  std::conditional_t<std::is_same_v<N, F32>, std::variant<Register<F32>, Expanded>,
                     std::variant<Register<B16>, PaperExpanded, Kahan>>
      number;

  N value() const { return on([](const auto& x) { return x.value(); }); }
  Parts parts() const { return on([](const auto& x) { return x.parts(); }); }

  AnyNumber scaled(const Expansion<N>& beta) const {
    return on([&](const auto& x) { return AnyNumber{x.scaled(beta)}; });
  }

  AnyNumber grown(N delta) const {
    return on([&](const auto& x) { return AnyNumber{x.grown(delta)}; });
  }

 private:
  template <class Fn>
  auto on(Fn fn) const {
    return std::visit(fn, number);
  }
};

struct Any {
  static constexpr bool random = true;  // perhaps
  Code code;

  template <int half>
  Planes read(const char* const* p, int64_t i) const {
    return visit(code, [&](auto format) { return format.template read<half>(p, i); });
  }

  void write(char* const* p, int64_t i, const Planes& even, const Planes& odd) const {
    visit(code, [&](auto format) { format.write(p, i, even, odd); });
  }

  template <class N>
  AnyNumber<N> number(const Planes& x) const {
    return visit(code, [&](auto format) -> AnyNumber<N> {
      if constexpr (std::is_same_v<N, F32> && std::is_same_v<decltype(format), Compensated>)
        return {Register<F32>{x.hi}};  // never: strategies.py refuses it
      else
        return {format.template number<N>(x)};
    });
  }

  template <class N, class Is>
  Planes encode(const AnyNumber<N>& number, U32 word, int slot, Is is_finite) const {
    return visit(code, [&](auto format) { return format.encode(number, word, slot, is_finite); });
  }

  template <class N>
  F32 whole(const AnyNumber<N>& number) const {
    return visit(code, [&](auto format) { return format.whole(number); });
  }

  Planes values(const Planes& codes) const {
    return visit(code, [&](auto format) { return format.values(codes); });
  }

  template <int part>
  F64 difference(const Planes& from, const Planes& to) const {
    return visit(code, [&](auto format) { return format.template difference<part>(from, to); });
  }

  Mask broken(const Planes& x) const {
    return visit(code, [&](auto format) { return format.broken(x); });
  }

  Mask moved(const Planes& from, const Planes& to) const {
    return visit(code, [&](auto format) { return format.moved(from, to); });
  }
};

}  // namespace
}  // namespace collage
