// Runs the kernels alone, without a runtime, on buffers of exactly the size that the contract gives them, so that the
// sanitizers see a read or write one byte beyond. Compares with plain loops. Prints the kernels that it ran and returns 0, or
// says what differs and returns 1. Built and run by tests/plugins/test_native_sanitizers.py and test_native_arm.py.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check_attention.h"
#include "check_groups.h"
#include "check_rows.h"
#include "kernels/cpu/dispatch.h"

namespace {

using namespace rankbook;

std::mt19937 random_source(1);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_source); }

template <class T>
std::vector<T> integers(int64_t count, int low, int high) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& value : out) value = static_cast<T>(std::uniform_int_distribution<int>(low, high)(random_source));
  return out;
}

std::vector<float> reals(int64_t count, float size) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = uniform(-size, size);
  return out;
}

// Tasks on two threads that take the next index from a counter, as a thread pool does.
void run_threads(void*, int64_t count, void (*task)(void*, int64_t), void* argument) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t index = next++; index < count; index = next++) task(argument, index);
  };
  std::thread other(work);
  work();
  other.join();
}

std::vector<Isa> all_isas() {
  std::vector<Isa> out;
  for (size_t i = 0; i < std::size(kIsaNames); ++i) out.push_back(static_cast<Isa>(i));
  return out;
}

// Heap memory of exactly so many bytes, on a cache line.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : held_(std::aligned_alloc(64, static_cast<size_t>(bytes)), std::free) {}
  uint8_t* get() const { return static_cast<uint8_t*>(held_.get()); }

 private:
  std::unique_ptr<void, decltype(&std::free)> held_;
};

struct Case {
  int bits, planes;
  bool offset;
  int64_t n, k, groups, rank, tokens;
};

// The tensors of one layer, drawn at random; heap blocks of the exact size.
struct Layer {
  CodebookWeight weight;
  LowRankBranch branch;
  std::vector<uint8_t> codes;
  std::vector<int8_t> params, down, up;
  std::vector<float> levels, step, base, middle;

  explicit Layer(const Case& c) {
    weight.bits = c.bits;
    weight.planes = c.planes;
    weight.has_offset = c.offset;
    weight.out_features = c.n;
    weight.in_features = c.k;
    weight.groups = c.groups;
    const int64_t planes = weight.param_planes();
    codes = integers<uint8_t>(weight.panels() * weight.blocks() * c.bits * kWordBytes, 0, 255);
    levels = reals(c.planes << c.bits, 1.0F);
    params = integers<int8_t>(weight.panels() * c.groups * planes * kPanel, -128, 127);
    step = reals(weight.panels() * planes, 0.01F);
    base = reals(weight.panels() * planes, 0.1F);
    branch.rank = c.rank;
    down = integers<int8_t>(ceil_div(c.rank, kPanel) * c.k * kPanel, -128, 127);
    up = integers<int8_t>(weight.panels() * c.rank * kPanel, -128, 127);
    middle = reals(c.rank, 1e-4F);
    weight.codes = codes.data();
    weight.levels = levels.data();
    weight.params = params.data();
    weight.step = step.data();
    weight.base = base.data();
    branch.down.codes = down.data();
    branch.up.codes = up.data();
    branch.middle = middle.data();
  }
};

double largest_error(const Case& c, const Layer& layer, const PanelKernels& kernels) {
  const Parallel parallel{nullptr, run_threads};
  std::vector<float> rows(static_cast<size_t>(c.n * c.k));
  std::vector<int64_t> indices;
  for (int64_t n = 0; n < c.n; ++n) indices.push_back(n);
  if (!codebook_gather({layer.weight, indices.data(), c.n, rows.data()}, parallel).ok()) return INFINITY;

  const std::vector<float> x = reals(c.tokens * c.k, 1.0F);
  const std::vector<float> bias = reals(c.n, 1.0F);
  std::vector<float> y(static_cast<size_t>(c.tokens * c.n));
  // Of two products at once: all rows in order, and the rows backwards. The second must give what the first does.
  std::vector<float> backwards(y.size());
  std::vector<int64_t> rows_backwards;
  for (int64_t m = c.tokens; m-- > 0;) rows_backwards.push_back(m);
  LinearArgs products[2];
  LinearArgs& args = products[0];
  args.weight = layer.weight;
  args.branch = layer.branch;
  args.bias = bias.data();
  args.x = x.data();
  args.tokens = c.tokens;
  args.y = y.data();
  products[1] = args;
  products[1].y = backwards.data();
  products[1].rows = rows_backwards.data();
  const Workspace workspace(linear_workspace(products, 2));
  if (!codebook_linear(products, 2, workspace.get(), kernels, parallel).ok() || backwards != y) return INFINITY;

  double worst = 0.0;
  for (int64_t m = 0; m < c.tokens; ++m) {
    std::vector<double> ranks(static_cast<size_t>(c.rank));
    for (int64_t r = 0; r < c.rank; ++r) {
      const int8_t* down = layer.down.data() + r / kPanel * c.k * kPanel + r % kPanel;
      for (int64_t k = 0; k < c.k; ++k) ranks[r] += static_cast<double>(x[m * c.k + k]) * down[k * kPanel];
      ranks[r] *= layer.middle[r];
    }
    for (int64_t n = 0; n < c.n; ++n) {
      const int8_t* up = layer.up.data() + n / kPanel * c.rank * kPanel + n % kPanel;
      double want = bias[n];
      double size = std::fabs(want);
      for (int64_t k = 0; k < c.k; ++k) {
        const double term = static_cast<double>(x[m * c.k + k]) * rows[n * c.k + k];
        want += term;
        size += std::fabs(term);
      }
      for (int64_t r = 0; r < c.rank; ++r) want += ranks[r] * up[r * kPanel];
      worst = std::fmax(worst, std::fabs(want - y[m * c.n + n]) / (size + 1.0));
    }
  }
  return worst;
}

// The same layer in the int8 mode; levels are made whole numbers first.
std::vector<float> run_int8(const Case& c, const Layer& layer, const Int8Kernels& kernels, const std::vector<float>& x,
                                const std::vector<float>& bias) {
  const int width = 1 << c.bits;
  std::vector<int32_t> levels(layer.levels.size());
  Int8Weight weight;
  weight.weight = layer.weight;
  std::vector<float> step = layer.step;
  std::vector<float> base = layer.base;
  const int64_t planes = layer.weight.param_planes();
  for (int plane = 0; plane < c.planes; ++plane) {
    int32_t* row = levels.data() + plane * width;
    const float unit = whole_levels(layer.levels.data() + plane * width, width, row);
    for (size_t i = static_cast<size_t>(plane); i < step.size(); i += static_cast<size_t>(planes)) {
      step[i] *= unit;
      base[i] *= unit;
    }
    weight.is_signed = weight.is_signed || needs_signed(row, width, kernels);
  }
  std::vector<PlaneTable> tables;
  for (int plane = 0; plane < c.planes; ++plane) {
    tables.push_back(prepare_table(levels.data() + plane * width, c.bits, weight.is_signed));
  }
  weight.tables = tables.data();
  weight.step = step.data();
  weight.base = base.data();
  weight.per_panel = true;

  Int8Branch branch;
  branch.rank = c.rank;
  const int64_t words = ceil_div(c.rank, kPanel) * layer.weight.blocks() * kBlock * kPanel;
  std::vector<uint8_t> down(static_cast<size_t>(words), 0x80);
  for (int64_t r = 0; r < c.rank; ++r) {
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t at = (r / kPanel * layer.weight.blocks() * 8 + k / 4) * kWordBytes + r % kPanel * 4 + k % 4;
      down[at] = static_cast<uint8_t>(layer.down[(r / kPanel * c.k + k) * kPanel + r % kPanel]);
    }
  }
  std::vector<float> ones(static_cast<size_t>(ceil_div(c.rank, kPanel) * c.groups * kPanel), 1.0F);
  int32_t codes[256];
  for (int code = 0; code < 256; ++code) codes[code] = code - 128;
  const bool is_signed = needs_signed(codes, 256, kernels);
  const PlaneTable table = prepare_table(codes, 8, is_signed);
  const float one = 1.0F;
  const float zero = 0.0F;
  CodebookWeight factor;
  factor.bits = 8;
  factor.out_features = c.rank;
  factor.in_features = c.k;
  factor.groups = c.groups;
  factor.planes = 1;
  factor.form = ParamForm::kFloat32;
  factor.codes = down.data();
  factor.params = ones.data();
  branch.down = {factor, &table, is_signed, &one, &zero, false};
  branch.up = layer.branch.up;
  branch.middle = layer.branch.middle;

  std::vector<float> y(static_cast<size_t>(c.tokens * c.n));
  std::vector<float> again(y.size());
  std::vector<float> backwards(y.size());
  std::vector<int64_t> rows;
  for (int64_t m = c.tokens; m-- > 0;) rows.push_back(m);
  const Int8Product products[] = {{weight, branch, bias.data(), y.data()}, {weight, branch, bias.data(), again.data()}};
  const Int8Product alone{weight, branch, bias.data(), backwards.data()};
  // Two products of one x, and one of its rows backwards.
  const Int8Args args[] = {{products, 2, x.data(), c.tokens, nullptr}, {&alone, 1, x.data(), c.tokens, rows.data()}};
  const Workspace workspace(int8_workspace(args, 2));
  const bool done = int8_linear(args, 2, workspace.get(), kernels, {nullptr, run_threads}).ok();
  if (!done || again != y || backwards != y) y.assign(y.size(), NAN);
  return y;
}

// Every instruction set gives the bits of the portable kernels (what those must be, the tests in Python say).
bool int8_agrees(const Case& c, const Layer& layer) {
  const std::vector<float> x = reals(c.tokens * c.k, 1.0F);
  const std::vector<float> bias = reals(c.n, 1.0F);
  const std::vector<float> want = run_int8(c, layer, *kPortableSet.int8, x, bias);
  bool same = true;
  for (const float value : want) same = same && std::isfinite(value);
  for (const Isa isa : all_isas()) {
    same = same && run_int8(c, layer, *select_kernels(isa).int8, x, bias) == want;
  }
  return same;
}

}  // namespace

int main() {
  const Case cases[] = {
      {2, 1, false, 33, 64, 2, 0, 1},   {2, 2, true, 64, 96, 2, 3, 5},     {3, 2, true, 70, 240, 5, 33, 1},
      {3, 1, true, 31, 45, 1, 0, 1},    {3, 5, false, 40, 80, 5, 1, 13},   {4, 2, true, 96, 128, 2, 8, 1},
      {4, 3, true, 32, 48, 3, 0, 200},  {4, 6, true, 1, 1, 1, 2, 3},       {8, 1, true, 65, 112, 7, 4, 1},
      {8, 2, false, 40, 33, 1, 0, 7},   {4, 1, true, 300, 512, 8, 16, 2},  {3, 2, true, 300, 512, 8, 16, 1},
      {4, 2, true, 70, 144, 3, 9, 8},   {2, 1, true, 64, 128, 2, 0, 4},    {3, 2, false, 33, 96, 2, 5, 16},
      {8, 1, true, 32, 48, 1, 0, 9},
  };
  int failures = 0;
  for (const Case& c : cases) {
    if (int8_agrees(c, Layer(c))) continue;
    std::fprintf(stderr, "int8 mode: %d bits, %d planes, N %ld, K %ld, M %ld: instruction sets differ\n", c.bits, c.planes,
                 static_cast<long>(c.n), static_cast<long>(c.k), static_cast<long>(c.tokens));
    ++failures;
  }
  for (const Isa isa : all_isas()) {
    const KernelSet set = select_kernels(isa);
    failures += check_attention(*set.attention, {nullptr, run_threads});
    failures += check_rows(*set.rows);
    failures += check_groups(*set.groups);
    const PanelKernels& kernels = *set.packed;
    std::printf("%s %s\n", kernels.name, set.int8->name);
    for (const Case& c : cases) {
      const Layer layer(c);
      const double error = largest_error(c, layer, kernels);
      if (error < 1e-5) continue;
      std::fprintf(stderr, "%s: %d bits, %d planes, N %ld, K %ld, M %ld: error %g\n", kernels.name, c.bits, c.planes,
                   static_cast<long>(c.n), static_cast<long>(c.k), static_cast<long>(c.tokens), error);
      ++failures;
    }
  }
  Layer broken({4, 1, true, 32, 64, 3, 0, 1});  // three groups cannot cut 64 inputs
  failures += check_weight(broken.weight) == refusal::kDivision ? 0 : 1;
  broken.weight.groups = 1;
  const int64_t beyond = 32;
  float row[64];
  failures += codebook_gather({broken.weight, &beyond, 1, row}, {}) == refusal::kIndex ? 0 : 1;
  return failures == 0 ? 0 : 1;
}
