// Drives the inner loops of the int8 mode. A few tokens read each code once and multiply as they go (memory bound). More
// tokens decode a slice of a panel to bytes in the L1 cache, plane by plane, and multiply that.

#include <atomic>
#include <cstring>
#include <thread>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/int8/int8.h"

namespace rankbook {
namespace {

constexpr int64_t kTokenChunk = 192;       // tokens that share one decoded part; 24 KB of totals
constexpr int64_t kStageTokens = 8;        // tokens that one task rounds
constexpr int64_t kTasks = 64;             // tasks of a single token, where each then reads within these bounds
constexpr int64_t kLeastBytes = 1 << 15;   // codes of one task: two threads read 2 to 6 % faster in large pieces,
constexpr int64_t kMostBytes = 1 << 18;    // many threads need many
constexpr int64_t kSerialWork = 1 << 17;   // multiply-adds below which waking threads costs more than it gains
constexpr int64_t kFirstBytes = 8192;      // codes to fetch while activations are rounded
constexpr int64_t kHeld = 4;               // panels of a single token that wait for the error branch
constexpr int kSpins = 1000;               // looks at a counter before the thread is offered to others; some microseconds
constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first halves of the error branch of a single token, taken and finished by whichever thread comes by: threads need not
// meet between them and the products, which would cost as much as the smaller ones.
// One fetch_add a half; nobody locks, and a thread that finds none left goes on with its panels.
struct Halves {
  std::atomic<int64_t> taken{0}, finished{0};
  int64_t count = 0;
};

struct Job {
  const Int8Args& args;
  const Int8Kernels& kernels;
  StagedRows natural;                 // order of 8 bits, for the error branch
  StagedRows staged;                  // order of the weight's width
  float* ranks[kMostProducts] = {};   // (M, RP * 32) of each product
  int64_t chunks = 1;                 // pieces of kTokenChunk tokens
  int64_t panels = 1;                 // panels per task of a single token
  Halves* halves = nullptr;           // of a single token

  const Int8Weight& weight() const { return args.products[0].weight; }  // for what all have in common
};

int64_t panels_of(const Int8Product& product) { return product.weight.weight.panels(); }

int64_t rank_panels_of(const Int8Product& product) { return ceil_div(product.branch.rank, kPanel); }

// The panels of all products in one row.
// Query, key and value are one list of panels: a step of a small model has 30 layers of 18 and 6 panels, and threads
// would wait at the end of each.
int64_t total(const Int8Args& args, int64_t (*panels)(const Int8Product&)) {
  int64_t out = 0;
  for (int i = 0; i < args.count; ++i) out += panels(args.products[i]);
  return out;
}

// One of them: which product, and which of its panels.
struct Place {
  int product = 0;
  int64_t panel;
  Place(const Int8Args& args, int64_t index, int64_t (*panels)(const Int8Product&)) : panel(index) {
    for (; panel >= panels(args.products[product]); ++product) panel -= panels(args.products[product]);
  }
};

void run(const Parallel& parallel, int64_t count, int64_t work, void (*task)(void*, int64_t), Job& job) {
  if (count > 1 && work >= kSerialWork && parallel.run != nullptr) {
    parallel.run(parallel.pool, count, task, &job);
    return;
  }
  for (int64_t index = 0; index < count; ++index) task(&job, index);
}

int64_t rank_width(const Int8Product& product) { return rank_panels_of(product) * kPanel; }

// Rounds tokens [index * kStageTokens, ...) and brings them into order.
void stage_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t end = least((index + 1) * kStageTokens, job.args.tokens);
  for (int64_t token = index * kStageTokens; token < end; ++token) {
    job.kernels.quantize(job.weight(), job.args.x, token, job.natural, job.staged);
  }
}

// total (tokens, 32) = w[panel] @ the staged tokens [first, first + tokens).
void multiply_panel(const Int8Kernels& kernels, const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t first,
                    int64_t tokens, float* total) {
  if (kernels.gemv(weight, panel, x, first, tokens, total)) return;
  alignas(kAlign) int32_t partial[kTokenChunk * kPanel];
  kernels.gemm(weight, panel, x, first, tokens, partial, total);
}

// The first half of the error branch for one panel of ranks and one chunk of tokens.
void branch_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const Place at(job.args, index / job.chunks, rank_panels_of);
  const Int8Product& product = job.args.products[at.product];
  const Int8Branch& branch = product.branch;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = least(job.args.tokens - first, kTokenChunk);
  alignas(kAlign) float total[kTokenChunk * kPanel];
  multiply_panel(job.kernels, branch.down, at.panel, job.natural, first, tokens, total);
  const int64_t ranks = least(branch.rank - at.panel * kPanel, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = job.ranks[at.product] + (first + token) * rank_width(product) + at.panel * kPanel;
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = total[token * kPanel + rank] * branch.middle[at.panel * kPanel + rank];
  }
}

// Adds the error branch and the bias, and writes the rows of the panel that exist.
void finish_panel(const Job& job, const Place& at, int64_t first, int64_t tokens, float* total) {
  const Int8Product& product = job.args.products[at.product];
  const Int8Branch& branch = product.branch;
  if (branch.rank > 0) {
    const int64_t width = rank_width(product);
    job.kernels.multiply_up(branch.up, at.panel, branch.rank, job.ranks[at.product] + first * width, width, tokens, total);
  }
  const int64_t n = product.weight.weight.out_features;
  const int64_t row = at.panel * kPanel;
  const int64_t rows = least(n - row, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* y = product.y + (first + token) * n + row;
    const float* from = total + token * kPanel;
    if (product.bias == nullptr) {
      std::memcpy(y, from, static_cast<size_t>(rows) * sizeof *y);
    } else {
      for (int64_t i = 0; i < rows; ++i) y[i] = from[i] + product.bias[row + i];
    }
  }
}

// Computes halves that nobody has taken.
// Release and acquire on `finished` order the ranks that were written before it; `taken` orders nothing.
void help(Job& job) {
  Halves& halves = *job.halves;
  while (halves.taken.load(std::memory_order_relaxed) < halves.count) {
    const int64_t index = halves.taken.fetch_add(1, std::memory_order_relaxed);
    if (index >= halves.count) return;
    branch_task(&job, index);
    halves.finished.fetch_add(1, std::memory_order_release);
  }
}

bool finished(const Halves& halves) { return halves.finished.load(std::memory_order_acquire) == halves.count; }

// Those that others have taken are being computed, so this ends.
void wait(const Halves& halves) {
  for (int spins = 0; !finished(halves); ++spins) {
    if (spins >= kSpins) std::this_thread::yield();
  }
}

// Panels are multiplied without waiting; up to kHeld of them are kept until the halves are there, so that in most calls
// nobody spins.
void token_task(void* argument, int64_t index) {
  Job& job = *static_cast<Job*>(argument);
  const int64_t end = least((index + 1) * job.panels, total(job.args, panels_of));
  help(job);
  alignas(kAlign) float sums[kHeld][kPanel];
  int64_t held = 0;  // panels before this one that are not finished
  for (int64_t panel = index * job.panels; panel < end; ++panel) {
    const Place at(job.args, panel, panels_of);
    const Int8Product& product = job.args.products[at.product];
    const PanelFactor& up = product.branch.up;
    const int64_t bytes = up.codes == nullptr ? 0 : product.branch.rank * kPanel;
    for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(up.codes + at.panel * bytes + i);  // for the end of this panel
    multiply_panel(job.kernels, product.weight, at.panel, job.staged, 0, 1, sums[held]);
    ++held;
    if (panel + 1 == end || held == kHeld) wait(*job.halves);
    if (!finished(*job.halves)) continue;
    for (int64_t i = 0; i < held; ++i) finish_panel(job, Place(job.args, panel + 1 - held + i, panels_of), 0, 1, sums[i]);
    held = 0;
  }
}

void chunk_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t panels = total(job.args, panels_of);
  const Place at(job.args, index % panels, panels_of);  // neighbours share their tokens, which are more bytes than codes
  const int64_t first = index / panels * kTokenChunk;
  const int64_t tokens = least(job.args.tokens - first, kTokenChunk);
  alignas(kAlign) float sums[kTokenChunk * kPanel];
  multiply_panel(job.kernels, job.args.products[at.product].weight, at.panel, job.staged, first, tokens, sums);
  finish_panel(job, at, first, tokens, sums);
}

// The loops of one token prefetch as they go; without this the first bytes of a small layer would be waited for.
void prefetch_start(const CodebookWeight& weight) {
  const int64_t bytes = least(weight.panels() * weight.blocks() * weight.bits * kWordBytes, kFirstBytes);
  for (int64_t at = 0; at < bytes; at += kAlign) __builtin_prefetch(weight.codes + at);
}

// Where everything lies in the workspace; returns its size. Without a workspace, the size alone.
// With 8 bits the natural order is the staged one, and one copy serves both.
int64_t lay_out(const Int8Args& args, uint8_t* at, Job* job) {
  const Int8Weight& weight = args.products[0].weight;
  const int64_t codes = aligned(args.tokens * weight.staged_bytes());
  const int64_t small = aligned(args.tokens * weight.weight.groups * 4);
  int64_t size = codes + 3 * small;
  for (int i = 0; i < args.count; ++i) {
    if (job != nullptr) job->ranks[i] = reinterpret_cast<float*>(at + size);
    size += aligned(args.tokens * rank_width(args.products[i]) * 4);
  }
  const bool both = weight.weight.bits != 8 && total(args, rank_panels_of) > 0;  // else brought into order in place
  if (job != nullptr) {
    job->natural.tokens = args.tokens;
    job->natural.codes = reinterpret_cast<int8_t*>(at);
    job->natural.sums = reinterpret_cast<int32_t*>(at + codes);
    job->natural.scales = reinterpret_cast<float*>(at + codes + small);
    job->natural.shifts = reinterpret_cast<float*>(at + codes + 2 * small);
    job->staged = job->natural;
    if (both) job->staged.codes = reinterpret_cast<int8_t*>(at + size);
  }
  return size + (both ? codes : 0);
}

Status check(const Int8Args& args) {
  if (args.count < 1 || args.count > kMostProducts) return refusal::kUnlike;
  const CodebookWeight& first = args.products[0].weight.weight;
  for (int i = 0; i < args.count; ++i) {
    const CodebookWeight& weight = args.products[i].weight.weight;
    const Status status = check_weight(weight);
    if (!status.ok()) return status;
    const bool alike = weight.bits == first.bits && weight.in_features == first.in_features && weight.groups == first.groups;
    if (!alike || weight.in_features / weight.groups > kLargestGroup) return refusal::kUnlike;
  }
  return {};
}

}  // namespace

int64_t int8_workspace(const Int8Args& args) { return lay_out(args, nullptr, nullptr); }

Status int8_linear(const Int8Args& args, const Int8Kernels& kernels, const Parallel& parallel) {
  const Status status = check(args);
  if (!status.ok() || args.tokens == 0) return status;
  const CodebookWeight& weight = args.products[0].weight.weight;

  Job job{args, kernels, {}, {}};
  lay_out(args, args.workspace, &job);
  job.chunks = ceil_div(args.tokens, kTokenChunk);
  const int64_t inputs = args.tokens * weight.in_features;
  if (args.tokens == 1) prefetch_start(weight);
  run(parallel, ceil_div(args.tokens, kStageTokens), inputs * 8, stage_task, job);
  const int64_t rank_panels = total(args, rank_panels_of);
  const int64_t panels = total(args, panels_of);
  const int64_t work = inputs * panels * kPanel;
  if (args.tokens == 1) {
    Halves halves;
    halves.count = rank_panels;
    job.halves = &halves;
    const int64_t bytes = weight.blocks() * weight.bits * kWordBytes;  // of a panel
    const int64_t task = panels * bytes / kTasks;
    job.panels = ceil_div(task < kLeastBytes ? kLeastBytes : least(task, kMostBytes), bytes);
    run(parallel, ceil_div(panels, job.panels), work, token_task, job);
  } else {
    run(parallel, rank_panels * job.chunks, inputs * rank_panels * kPanel, branch_task, job);
    run(parallel, panels * job.chunks, work, chunk_task, job);
  }
  return {};
}

}  // namespace rankbook
