// Drives the inner loops of the int8 mode. A few tokens read each code once and multiply as they go (memory bound). More
// tokens decode a slice of a panel to bytes in the L1 cache, plane by plane, and multiply that.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/int8/int8.h"
#include "kernels/cpu/tasks.h"

namespace rankbook {
namespace {

constexpr int64_t kTokenChunk = 192;       // tokens that share one decoded part; 24 KB of totals
constexpr int64_t kStageTokens = 8;        // tokens that one task rounds
constexpr int64_t kFewTokens = 8;          // tokens whose tasks are cut by what they read, as it takes longest
constexpr int64_t kTasks = 64;             // tasks of few tokens, where each then reads within these bounds
constexpr int64_t kLeastBytes = 1 << 15;   // codes of one task: two threads read 2 to 6 % faster in large pieces,
constexpr int64_t kMostBytes = 1 << 18;    // many threads need many
constexpr int64_t kSerialWork = 1 << 17;   // multiply-adds below which waking threads costs more than it gains
constexpr int64_t kFirstBytes = 8192;      // codes to fetch while activations are rounded
constexpr int64_t kHeld = 4;               // panels of a single token that wait for the error branch
constexpr int kSpins = 1000;               // looks at a counter before the thread is offered to others; some microseconds
constexpr int64_t kAlign = 64;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first halves of the error branch of a single token, taken and finished by whichever thread comes by: threads need not
// meet between them and the products, which would cost as much as the smaller ones.
// One fetch_add a half; nobody locks, and a thread that finds none left goes on with its panels.
struct Halves {
  std::atomic<int64_t> taken{0}, finished{0};
  int64_t count = 0;
};

struct Job {
  const Int8Args* args;
  const Int8Kernels* kernels;
  StagedRows natural;                 // order of 8 bits, for the error branch
  StagedRows staged;                  // order of the weight's width
  float* ranks[kMostProducts] = {};   // (M, RP * 32) of each product
  int64_t chunks = 1;                 // pieces of kTokenChunk tokens
  int64_t panels = 1;                 // panels per task
  Halves halves = {};                 // of a single token
  int64_t first = 0;                  // of its tasks among those of all jobs
  const Job* next = nullptr;          // of a single token: the one behind it

  const Int8Weight& weight() const { return args->products[0].weight; }  // for what all have in common
  int64_t tokens() const { return args->tokens; }
  int64_t row(int64_t token) const { return args->rows == nullptr ? token : args->rows[token]; }
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

int64_t rank_width(const Int8Product& product) { return rank_panels_of(product) * kPanel; }

// Rounds tokens [index * kStageTokens, ...) and brings them into order.
void stage_task(Job& job, int64_t index) {
  const int64_t end = least((index + 1) * kStageTokens, job.tokens());
  for (int64_t token = index * kStageTokens; token < end; ++token) {
    const float* const x = job.args->x + job.row(token) * job.weight().weight.in_features;
    job.kernels->quantize(job.weight(), x, token, job.natural, job.staged);
  }
}

// total (panels, tokens, 32) = w[panel ... panel + panels) @ the staged tokens [first, first + tokens).
void multiply_panels(const Int8Kernels& kernels, const Int8Weight& weight, int64_t panel, int64_t panels, const StagedRows& x,
                     int64_t first, int64_t tokens, float* total) {
  if (kernels.gemv(weight, panel, panels, x, first, tokens, total)) return;
  alignas(kAlign) int32_t partial[kTokenChunk * kPanel];
  for (int64_t i = 0; i < panels; ++i) {
    kernels.gemm(weight, panel + i, x, first, tokens, partial, total + i * tokens * kPanel);
  }
}

// The first half of the error branch for one panel of ranks and one chunk of tokens.
void branch_task(Job& job, int64_t index) {
  const Place at(*job.args, index / job.chunks, rank_panels_of);
  const Int8Product& product = job.args->products[at.product];
  const Int8Branch& branch = product.branch;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = least(job.tokens() - first, kTokenChunk);
  alignas(kAlign) float total[kTokenChunk * kPanel];
  multiply_panels(*job.kernels, branch.down, at.panel, 1, job.natural, first, tokens, total);
  const int64_t ranks = least(branch.rank - at.panel * kPanel, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = job.ranks[at.product] + (first + token) * rank_width(product) + at.panel * kPanel;
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = total[token * kPanel + rank] * branch.middle[at.panel * kPanel + rank];
  }
}

// Adds the error branch and the bias, and writes the rows of the panel that exist.
void finish_panel(const Job& job, const Place& at, int64_t first, int64_t tokens, float* total) {
  const Int8Product& product = job.args->products[at.product];
  const Int8Branch& branch = product.branch;
  if (branch.rank > 0) {
    const int64_t width = rank_width(product);
    job.kernels->multiply_up(branch.up, at.panel, branch.rank, job.ranks[at.product] + first * width, width, tokens, total);
  }
  const int64_t n = product.weight.weight.out_features;
  const int64_t row = at.panel * kPanel;
  const int64_t rows = least(n - row, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* y = product.y + job.row(first + token) * n + row;
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
  Halves& halves = job.halves;
  while (halves.taken.load(std::memory_order_relaxed) < halves.count) {
    const int64_t index = halves.taken.fetch_add(1, std::memory_order_relaxed);
    if (index >= halves.count) return;
    branch_task(job, index);
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

// The loops of one token prefetch as they go; without this the first bytes of a small layer would be waited for.
void prefetch_start(const CodebookWeight& weight) {
  const int64_t bytes = least(weight.panels() * weight.blocks() * weight.bits * kWordBytes, kFirstBytes);
  for (int64_t at = 0; at < bytes; at += kAlign) __builtin_prefetch(weight.codes + at);
}

// Panels are multiplied without waiting; up to kHeld of them are kept until the halves are there, so that in most calls
// nobody spins.
void token_task(Job& job, int64_t index) {
  const int64_t panels = total(*job.args, panels_of);
  const int64_t end = least((index + 1) * job.panels, panels);
  if (end == panels && job.next != nullptr) prefetch_start(job.next->weight().weight);
  help(job);
  alignas(kAlign) float sums[kHeld][kPanel];
  int64_t held = 0;  // panels before this one that are not finished
  for (int64_t panel = index * job.panels; panel < end; ++panel) {
    const Place at(*job.args, panel, panels_of);
    const Int8Product& product = job.args->products[at.product];
    const PanelFactor& up = product.branch.up;
    const int64_t bytes = up.codes == nullptr ? 0 : product.branch.rank * kPanel;
    for (int64_t i = 0; i < bytes; i += kAlign) __builtin_prefetch(up.codes + at.panel * bytes + i);  // for the end of this panel
    multiply_panels(*job.kernels, product.weight, at.panel, 1, job.staged, 0, 1, sums[held]);
    ++held;
    if (panel + 1 == end || held == kHeld) wait(job.halves);
    if (!finished(job.halves)) continue;
    for (int64_t i = 0; i < held; ++i) finish_panel(job, Place(*job.args, panel + 1 - held + i, panels_of), 0, 1, sums[i]);
    held = 0;
  }
}

// Several panels where tokens are few, neighbours of one product at a time.
void chunk_task(const Job& job, int64_t index) {
  const int64_t panels = total(*job.args, panels_of);
  const int64_t tasks = ceil_div(panels, job.panels);  // of a chunk: neighbours share their tokens, which are more bytes than codes
  const int64_t first = index / tasks * kTokenChunk;
  const int64_t tokens = least(job.tokens() - first, kTokenChunk);
  const int64_t begin = index % tasks * job.panels;
  const int64_t end = least(begin + job.panels, panels);
  alignas(kAlign) float sums[kTokenChunk * kPanel];
  for (int64_t panel = begin; panel < end;) {
    const Place at(*job.args, panel, panels_of);
    const Int8Weight& weight = job.args->products[at.product].weight;
    const int64_t count = least(end - panel, weight.weight.panels() - at.panel);
    multiply_panels(*job.kernels, weight, at.panel, count, job.staged, first, tokens, sums);
    for (int64_t i = 0; i < count; ++i) {
      finish_panel(job, Place(*job.args, panel + i, panels_of), first, tokens, sums + i * tokens * kPanel);
    }
    panel += count;
  }
}

void product_task(Job& job, int64_t index) { job.tokens() == 1 ? token_task(job, index) : chunk_task(job, index); }

// Where everything lies in the workspace; returns its size. Without a workspace, the size alone.
// With 8 bits the natural order is the staged one, and one copy serves both.
int64_t lay_out(const Int8Args* args, int64_t count, uint8_t* workspace, const Int8Kernels* kernels, Job** jobs) {
  Cutter cutter(workspace);
  *jobs = cutter.take<Job>(count);
  for (int64_t i = 0; i < count; ++i) {
    const Int8Args& one = args[i];
    const Int8Weight& weight = one.products[0].weight;
    const int64_t bytes = one.tokens * weight.staged_bytes();
    const int64_t scales = one.tokens * weight.weight.groups;
    StagedRows rows{one.tokens, cutter.take<int8_t>(bytes), nullptr, nullptr, nullptr};
    rows.sums = cutter.take<int32_t>(scales);
    rows.scales = cutter.take<float>(scales);
    rows.shifts = cutter.take<float>(scales);
    float* ranks[kMostProducts] = {};
    for (int j = 0; j < one.count; ++j) ranks[j] = cutter.take<float>(one.tokens * rank_width(one.products[j]));
    StagedRows staged = rows;
    // Else brought into order in place.
    if (weight.weight.bits != 8 && total(one, rank_panels_of) > 0) staged.codes = cutter.take<int8_t>(bytes);
    if (workspace == nullptr) continue;
    Job* const job = new (*jobs + i) Job{&one, kernels, rows, staged};
    std::copy_n(ranks, kMostProducts, job->ranks);
    job->chunks = ceil_div(one.tokens, kTokenChunk);
    job->halves.count = total(one, rank_panels_of);
  }
  return cutter.size();
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

int64_t bytes_of_panel(const CodebookWeight& weight) { return weight.blocks() * weight.bits * kWordBytes; }

// Of all arguments together.
struct Sizes {
  int64_t inputs = 0, branch = 0, work = 0;  // elements of x, and multiply-adds
  int64_t bytes = 0;                         // of the codes of few tokens

  void add(const Int8Args& args) {
    const CodebookWeight& weight = args.products[0].weight.weight;
    const int64_t x = args.tokens * weight.in_features;
    inputs += x;
    branch += x * total(args, rank_panels_of) * kPanel;
    work += x * total(args, panels_of) * kPanel;
    if (args.tokens <= kFewTokens) bytes += total(args, panels_of) * bytes_of_panel(weight);
  }

  int64_t panels_of_task(const Int8Args& args) const {
    if (args.tokens < 1 || args.tokens > kFewTokens) return 1;
    const int64_t task = bytes / kTasks < kLeastBytes ? kLeastBytes : least(bytes / kTasks, kMostBytes);
    const int64_t panels = ceil_div(task, bytes_of_panel(args.products[0].weight.weight));
    return least(panels, kTokenChunk / args.tokens);  // whose sums are kept until all of them are there
  }
};

// A single token has its halves of the branch among its products.
int64_t stage_tasks(const Job& job) { return ceil_div(job.tokens(), kStageTokens); }
int64_t branch_tasks(const Job& job) { return job.tokens() == 1 ? 0 : job.halves.count * job.chunks; }
int64_t product_tasks(const Job& job) {
  const int64_t panels = total(*job.args, panels_of);
  return ceil_div(panels, job.panels) * job.chunks;
}

}  // namespace

int64_t int8_workspace(const Int8Args* args, int64_t count) {
  Job* none = nullptr;
  return lay_out(args, count, nullptr, nullptr, &none);
}

Status int8_linear(const Int8Args* args, int64_t count, uint8_t* workspace, const Int8Kernels& kernels,
                   const Parallel& parallel) {
  Sizes sizes;
  for (int64_t i = 0; i < count; ++i) {
    const Status status = check(args[i]);
    if (!status.ok()) return status;
    sizes.add(args[i]);
  }
  Job* jobs = nullptr;
  lay_out(args, count, workspace, &kernels, &jobs);
  for (int64_t i = 0; i < count; ++i) {
    jobs[i].panels = sizes.panels_of_task(args[i]);
    jobs[i].next = i + 1 < count && args[i + 1].tokens == 1 ? jobs + i + 1 : nullptr;
  }
  if (count > 0 && args[0].tokens == 1) prefetch_start(jobs[0].weight().weight);
  run_jobs(parallel, jobs, count, sizes.inputs * 8, kSerialWork, stage_tasks, stage_task);
  run_jobs(parallel, jobs, count, sizes.branch, kSerialWork, branch_tasks, branch_task);
  run_jobs(parallel, jobs, count, sizes.work, kSerialWork, product_tasks, product_task);
  return {};
}

}  // namespace rankbook
