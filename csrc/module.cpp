// The Python module collage._native: raw addresses in, nothing of torch. backends/cpu.py is its only user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.hpp"
#include "parallel.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace collage {

extern const InstructionSet portable;
#ifdef COLLAGE_X86
extern const InstructionSet avx2, avx512;
#endif

namespace {

using Numbers = std::vector<int64_t>;
using Addresses = std::vector<uint64_t>;

// What this machine can run, best first.
std::vector<std::pair<std::string, const InstructionSet*>> instruction_sets() {
  std::vector<std::pair<std::string, const InstructionSet*>> sets;
#ifdef COLLAGE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.emplace_back("avx512", &avx512);
  if (__builtin_cpu_supports("avx2")) sets.emplace_back("avx2", &avx2);
#endif
  sets.emplace_back("portable", &portable);
  return sets;
}

const InstructionSet& instruction_set(const std::string& name) {
  for (const auto& [known, set] : instruction_sets())
    if (known == name) return *set;
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

Code code_of(const std::string& format) {
  static const std::map<std::string, Code> codes{
      {"fp32", {Code::single, Code::fp32, false}},     {"bf16", {Code::single, Code::bf16, false}},
      {"fp16", {Code::single, Code::fp16, false}},     {"bf16x2", {Code::pair, Code::bf16, false}},
      {"bf16:sr", {Code::single, Code::bf16, true}},   {"bf16x2:sr", {Code::pair, Code::bf16, true}},
      {"bf16+fp32", {Code::master, Code::bf16, false}}, {"bf16+kahan", {Code::compensated, Code::bf16, false}},
  };
  return codes.at(format);
}

// One rule under one strategy and gradient dtype, on one instruction set.
class Stepper {
 public:
  Stepper(const std::string& set, const std::string& rule, const std::vector<std::string>& formats,
          bool bfloat16_arithmetic, const std::string& gradient)
      : set_(instruction_set(set)) {
    if (rule != "adamw" || formats.size() != MAX_SLOTS) throw std::invalid_argument("no kernel for rule '" + rule + "'");
    request_.rule = Request::adamw;
    for (int s = 0; s < MAX_SLOTS; ++s) request_.slots[s] = code_of(formats[s]);
    request_.bfloat16_arithmetic = bfloat16_arithmetic;
    request_.gradient = code_of(gradient).component;
    kernel_.reset(set_.make(request_));
  }

  // All tensors of a call. Per tensor: elements; the addresses of its planes, in slot order; its gradient's; the index
  // of its row of constants; its stream of random bits. shards: sizes, starts and global strides in a row, or nothing.
  // layouts: sizes, then strides of every plane and of the gradient, or nothing. sums: address of SUMS float64 that
  // the block sums are added to, or nothing.
  void step(const Numbers& numel, const Addresses& planes, const Addresses& gradients,
            const std::vector<std::vector<float>>& constants, const Numbers& rows, const Addresses& streams,
            const std::vector<Numbers>& shards, const std::vector<Numbers>& layouts, const Addresses& sums,
            bool maximize, int threads) const {
    std::vector<Tensor> tensors = collect(numel, planes, gradients);
    const auto fits = [&](size_t n) { return n == 0 || n == numel.size(); };
    if (rows.size() != numel.size() || !fits(streams.size()) || !fits(shards.size()) || !fits(layouts.size()) ||
        !fits(sums.size()))
      throw std::invalid_argument("rows, streams, shards, layouts or sums: their number is not that of the tensors");
    for (int64_t row : rows)
      if (row < 0 || row >= int64_t(constants.size()) || constants[row].size() < MAX_CONSTANTS)
        throw std::invalid_argument("rows: each needs a whole row of constants");
    std::vector<Region> regions(shards.size());
    std::vector<Layout> strided(layouts.size());
    for (size_t k = 0; k < tensors.size(); ++k) {
      Tensor& t = tensors[k];
      t.constants = constants[rows[k]].data();
      t.stream = streams.empty() ? 0 : streams[k];
      t.maximize = maximize;
      if (!shards.empty() && !shards[k].empty()) {
        const int dims = int(shards[k].size() / 3);
        const int64_t* const at = shards[k].data();
        regions[k] = {dims, at, at + dims, at + 2 * dims};
        t.region = &regions[k];
      }
      if (!layouts.empty() && !layouts[k].empty()) {
        strided[k] = layout(layouts[k]);
        t.layout = &strided[k];
      }
    }
    nb::gil_scoped_release release;
    std::vector<double> scratch;
    if (!sums.empty()) scratch = attach_sums(tensors);
    run(tensors, threads, [&](const Tensor& t, int64_t first, int64_t end) { kernel_->run(t, first, end); });
    for (size_t k = 0; k < sums.size(); ++k) add_up(tensors[k], reinterpret_cast<double*>(sums[k]));
  }

  // How many elements of theta, in all tensors, have planes that no step could have left. planes: theta's alone.
  int64_t broken(const Numbers& numel, const Addresses& planes, int threads) const {
    const std::vector<Tensor> tensors = collect(numel, planes, {}, 1);
    nb::gil_scoped_release release;
    std::atomic<int64_t> total{0};
    run(tensors, threads, [&](const Tensor& t, int64_t first, int64_t end) { total += kernel_->broken(t, first, end); });
    return total;
  }

  // The physical limit of `step`: reads and writes the same planes, without arithmetic.
  void stream(const Numbers& numel, const Addresses& planes, const Addresses& gradients, int threads) const {
    std::vector<Tensor> tensors = collect(numel, planes, gradients);
    int bytes[MAX_SLOTS][MAX_PLANES];
    for (int s = 0; s < MAX_SLOTS; ++s)
      for (int p = 0; p < MAX_PLANES; ++p) bytes[s][p] = request_.slots[s].bytes(p);
    const int gradient_bytes = request_.gradient == Code::fp32 ? 4 : 2;
    volatile uint32_t zero = 0;  // a constant would let the compiler drop the copy
    const uint32_t mask = zero;
    nb::gil_scoped_release release;
    run(tensors, threads, [&](const Tensor& t, int64_t first, int64_t end) {
      set_.stream(t, bytes, gradient_bytes, mask, first, end);
    });
  }

 private:
  // Every tensor with its planes of the first so many slots, and its gradient if there are any.
  std::vector<Tensor> collect(const Numbers& numel, const Addresses& planes, const Addresses& gradients,
                              int slots = MAX_SLOTS) const {
    std::vector<Tensor> tensors(numel.size());
    auto plane = planes.begin();
    size_t width = 0;
    for (int s = 0; s < slots; ++s)
      for (int p = 0; p < MAX_PLANES; ++p) width += request_.slots[s].bytes(p) > 0;
    if (planes.size() != width * numel.size() || (slots == MAX_SLOTS && gradients.size() != numel.size()))
      throw std::invalid_argument("planes or gradients: their number is not that of the tensors");
    for (size_t k = 0; k < tensors.size(); ++k) {
      tensors[k] = {};
      tensors[k].numel = numel[k];
      for (int s = 0; s < slots; ++s)
        for (int p = 0; p < MAX_PLANES; ++p)
          if (request_.slots[s].bytes(p)) tensors[k].planes[s][p] = reinterpret_cast<char*>(*plane++);
      if (slots == MAX_SLOTS) tensors[k].gradient = reinterpret_cast<const char*>(gradients[k]);
    }
    return tensors;
  }

  Layout layout(const Numbers& numbers) const {
    int planes = 1;
    for (const Code& code : request_.slots) planes += code.bytes(1) ? 2 : 1;
    Layout l{int(numbers.size()) / (planes + 1), numbers.data(), {}, nullptr};
    const int64_t* at = numbers.data() + l.dims;
    for (int s = 0; s < MAX_SLOTS; ++s)
      for (int p = 0; p < MAX_PLANES; ++p)
        if (request_.slots[s].bytes(p)) l.planes[s][p] = at, at += l.dims;
    l.gradient = at;
    return l;
  }

  // Memory for the sums of every block; each tensor knows its part.
  static std::vector<double> attach_sums(std::vector<Tensor>& tensors) {
    int64_t blocks = 0;
    for (const Tensor& t : tensors) blocks += blocks_of(t);
    std::vector<double> memory(blocks * SUMS);
    double* at = memory.data();
    for (Tensor& t : tensors) {
      t.sums = at;
      at += blocks_of(t) * SUMS;
    }
    return memory;
  }

  // In the order of the blocks, whichever thread took them.
  static void add_up(const Tensor& t, double* sums) {
    for (int64_t b = 0; b < blocks_of(t); ++b)
      for (int k = 0; k < SUMS; ++k) sums[k] += t.sums[b * SUMS + k];
  }

  template <class Fn>
  static void run(const std::vector<Tensor>& tensors, int threads, Fn fn) {
    Numbers ends(tensors.size());
    int64_t blocks = 0;
    for (size_t k = 0; k < tensors.size(); ++k) ends[k] = blocks += blocks_of(tensors[k]);
    parallel(blocks, threads, [&](int64_t first, int64_t end) {
      for (size_t k = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin(); first < end; ++k) {
        const int64_t start = ends[k] - blocks_of(tensors[k]), stop = std::min(end, ends[k]);
        if (first < stop) fn(tensors[k], first - start, stop - start);
        first = stop;
      }
    });
  }

  const InstructionSet& set_;
  Request request_{};
  std::unique_ptr<Kernel> kernel_;
};

}  // namespace
}  // namespace collage

NB_MODULE(_native, m) {
  using collage::Stepper;
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& [name, set] : collage::instruction_sets()) names.push_back(name);
    return names;
  });
  m.def("count_up", [](const collage::Addresses& counters) {  // of int64, in the memory of this process
    collage::Numbers numbers;
    for (uint64_t at : counters) numbers.push_back(++*reinterpret_cast<int64_t*>(at));
    return numbers;
  });
  nb::class_<Stepper>(m, "Stepper")
      .def(nb::init<const std::string&, const std::string&, const std::vector<std::string>&, bool, const std::string&>(),
           "instruction_set"_a, "rule"_a, "formats"_a, "bfloat16_arithmetic"_a, "gradient"_a)
      .def("step", &Stepper::step, "numel"_a, "planes"_a, "gradients"_a, "constants"_a, "rows"_a, "streams"_a,
           "shards"_a, "layouts"_a, "sums"_a, "maximize"_a, "threads"_a)
      .def("broken", &Stepper::broken, "numel"_a, "planes"_a, "threads"_a)
      .def("stream", &Stepper::stream, "numel"_a, "planes"_a, "gradients"_a, "threads"_a);
}
