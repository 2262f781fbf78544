// The Python module collage._native: raw addresses in, nothing of torch. backends/cpu.py is its only user.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.hpp"
#include "parallel.hpp"
#ifdef COLLAGE_X86
#include <cpuid.h>
#endif

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
  unsigned a, b, c, d;
  if (__builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C)) sets.emplace_back("avx2", &avx2);
#endif
  sets.emplace_back("portable", &portable);
  return sets;
}

const InstructionSet& instruction_set(const std::string& name) {
  for (const auto& [known, set] : instruction_sets())
    if (known == name) return *set;
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string(what) + ": their number is not that of the tensors");
}

// All tensors of a call, as columns. planes: addresses, tensor by tensor in slot order. Of the rest, none at all stands
// for nothing of the kind: no gradient is read, nothing is random, sharded, strided, or measured.
struct Columns {
  Numbers numel;
  Addresses planes, gradients;
  std::vector<std::vector<float>> constants;  // rows, of which each tensor takes one
  Numbers rows;
  Addresses streams;             // of random bits
  std::vector<Numbers> shards;   // sizes, starts and global strides in a row, or nothing
  std::vector<Numbers> layouts;  // sizes, then strides of every plane with a word per element, then the gradient's
  Numbers columns;               // of a row: where a format has planes with words of several elements
  Addresses sums;                // of the kernel's sums, float64, that those of blocks are added to
  bool maximize = false;
  float scale = 1.0f;  // gradients are divided by it
};

// One operation on given formats, on one instruction set: a rule's step, decode, encode, broken, squares or stream.
class Operation {
 public:
  Operation(const std::string& set, const std::string& operation, const std::vector<std::string>& formats,
            const std::vector<std::pair<uint64_t, int>>& random, bool bfloat16_arithmetic, const std::string& gradient) {
    Request request{};
    request.operation = operation.c_str();
    request.slots = int(formats.size());
    request.bfloat16_arithmetic = bfloat16_arithmetic;
    request.gradient = gradient.empty() ? nullptr : gradient.c_str();
    if (formats.empty() || formats.size() > MAX_SLOTS) throw std::invalid_argument("formats: one for each of 1 to 4 slots");
    for (size_t s = 0; s < formats.size(); ++s) {
      request.formats[s] = formats[s].c_str();
      request.salts[s] = s < random.size() ? random[s].first : 0;
      request.parts[s] = s < random.size() ? random[s].second : -1;
    }
    kernel_.reset(instruction_set(set).make(request));
    if (!kernel_) throw std::invalid_argument("no kernel for '" + operation + "' on these formats and gradients");
    for (int s = 0; s < kernel_->slots; ++s)
      for (int p = 0; p < kernel_->formats[s]->count; ++p, ++planes_) elementwise_ += kernel_->formats[s]->planes[p].per == 1;
  }

  // How many elements it counted, which only `broken` does.
  int64_t run(const Columns& c, int threads) const {
    check(c);
    std::vector<double> scratch;
    nb::gil_scoped_release release;
    Numbers ends(c.numel.size());  // in blocks
    int64_t blocks = 0;
    for (size_t k = 0; k < ends.size(); ++k) ends[k] = blocks += blocks_of(c.numel[k], row_length(c, k));
    if (!c.sums.empty()) scratch.resize(blocks * kernel_->sums);
    std::atomic<int64_t> counted{0};
    parallel(blocks, threads, [&](int64_t first, int64_t end) {
      int64_t found = 0;
      for (size_t k = std::upper_bound(ends.begin(), ends.end(), first) - ends.begin(); first < end; ++k) {
        const int64_t start = k ? ends[k - 1] : 0, stop = std::min(end, ends[k]);
        if (first < stop) found += run_one(c, k, scratch.data() + start * kernel_->sums, first - start, stop - start);
        first = stop;
      }
      counted += found;
    });
    const auto adding = kernel_->sums == SUMS ? add_up : add_up_halved;
    for (size_t k = 0; k < c.sums.size(); ++k)
      adding(scratch.data(), k ? ends[k - 1] : 0, ends[k], reinterpret_cast<double*>(c.sums[k]));
    return counted;
  }

 private:
  void check(const Columns& c) const {
    const size_t count = c.numel.size();
    const auto all = [&](size_t n) { return n == count; };
    const auto fits = [&](size_t n) { return n == 0 || n == count; };
    require(c.planes.size() == planes_ * count, "planes");
    require(kernel_->gradient ? all(c.gradients.size()) : c.gradients.empty(), "gradients");
    require(kernel_->constants ? all(c.rows.size()) : c.rows.empty(), "rows");
    require(elementwise_ == planes_ ? fits(c.columns.size()) : all(c.columns.size()), "columns");
    require(fits(c.streams.size()) && fits(c.shards.size()) && fits(c.layouts.size()), "streams, shards or layouts");
    require(kernel_->sums == SUMS ? fits(c.sums.size()) : all(c.sums.size()), "sums");
    for (int64_t row : c.rows)
      if (row < 0 || row >= int64_t(c.constants.size()) || c.constants[row].size() < size_t(kernel_->constants))
        throw std::invalid_argument("rows: each needs a whole row of constants");
  }

  static int64_t row_length(const Columns& c, size_t k) { return c.columns.empty() ? c.numel[k] : c.columns[k]; }

  // Some blocks of one tensor.
  int64_t run_one(const Columns& c, size_t k, double* sums, int64_t first, int64_t end) const {
    Tensor t;
    t.numel = c.numel[k];
    t.columns = row_length(c, k);
    const uint64_t* plane = c.planes.data() + k * planes_;
    for (int s = 0; s < kernel_->slots; ++s)
      for (int p = 0; p < kernel_->formats[s]->count; ++p) t.planes[s][p] = reinterpret_cast<char*>(*plane++);
    t.gradient = kernel_->gradient ? reinterpret_cast<const char*>(c.gradients[k]) : nullptr;
    t.constants = kernel_->constants ? c.constants[c.rows[k]].data() : nullptr;
    t.stream = c.streams.empty() ? 0 : c.streams[k];
    const Region region = c.shards.empty() ? Region{} : region_of(c.shards[k]);
    t.region = region.dims ? &region : nullptr;
    const Layout layout = c.layouts.empty() ? Layout{} : layout_of(c.layouts[k]);
    t.layout = layout.dims ? &layout : nullptr;
    t.sums = c.sums.empty() ? nullptr : sums;
    t.scale = c.scale;
    t.maximize = c.maximize;
    return kernel_->run(t, first, end);
  }

  static Region region_of(const Numbers& shard) {
    const int dims = int(shard.size() / 3);
    return {dims, shard.data(), shard.data() + dims, shard.data() + 2 * dims};
  }

  Layout layout_of(const Numbers& layout) const {
    const int dims = int(layout.size() / (1 + elementwise_ + (kernel_->gradient != nullptr)));
    return {dims, layout.data(), layout.data() + dims};
  }

  // In the order of the blocks, whichever thread took them.
  static void add_up(double* blocks, int64_t first, int64_t end, double* sums) {
    for (int64_t b = first; b < end; ++b)
      for (int k = 0; k < SUMS; ++k) sums[k] += blocks[b * SUMS + k];
  }

  // One sum of each block: again in blocks, halved pairwise. What is not there is 0, and adds nothing.
  static void add_up_halved(double* blocks, int64_t first, int64_t end, double* sum) {
    for (; first < end; first += BLOCK) {
      double* const x = blocks + first;
      int64_t count = std::min<int64_t>(BLOCK, end - first);
      for (int64_t half = BLOCK / 2; half; half /= 2) {
        for (int64_t i = 0; i + half < count; ++i) x[i] += x[i + half];
        count = std::min(count, half);
      }
      *sum += x[0];
    }
  }

  std::unique_ptr<Kernel> kernel_;
  size_t planes_ = 0, elementwise_ = 0;  // of one tensor; those with a word per element
};

int64_t run(const Operation& operation, Numbers numel, Addresses planes, Addresses gradients,
            std::vector<std::vector<float>> constants, Numbers rows, Addresses streams, std::vector<Numbers> shards,
            std::vector<Numbers> layouts, Numbers columns, Addresses sums, bool maximize, float scale, int threads) {
  return operation.run({std::move(numel), std::move(planes), std::move(gradients), std::move(constants),
                        std::move(rows), std::move(streams), std::move(shards), std::move(layouts), std::move(columns),
                        std::move(sums), maximize, scale},
                       threads);
}

}  // namespace
}  // namespace collage

NB_MODULE(_native, m) {
  using namespace collage;
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& [name, set] : instruction_sets()) names.push_back(name);
    return names;
  });
  m.def("count_up", [](const Addresses& counters) {  // of int64, in the memory of this process
    Numbers numbers;
    for (uint64_t at : counters) numbers.push_back(++*reinterpret_cast<int64_t*>(at));
    return numbers;
  });
  nb::class_<Operation>(m, "Operation")
      .def(nb::init<const std::string&, const std::string&, const std::vector<std::string>&,
                    const std::vector<std::pair<uint64_t, int>>&, bool, const std::string&>(),
           "instruction_set"_a, "operation"_a, "formats"_a, "random"_a = std::vector<std::pair<uint64_t, int>>(),
           "bfloat16_arithmetic"_a = false, "gradient"_a = "")
      .def("run", run, "numel"_a, "planes"_a, "gradients"_a = Addresses(), "constants"_a = std::vector<std::vector<float>>(),
           "rows"_a = Numbers(), "streams"_a = Addresses(), "shards"_a = std::vector<Numbers>(),
           "layouts"_a = std::vector<Numbers>(), "columns"_a = Numbers(), "sums"_a = Addresses(), "maximize"_a = false,
           "scale"_a = 1.0f, "threads"_a = 1);
}
