// Drives the inner loops of the int8 mode. A few tokens read each code once and multiply as they go (memory bound). More
// tokens decode a slice of a panel to bytes in the L1 cache, plane by plane, and multiply that.

#include <cstring>

#include "kernels/dispatch.h"
#include "kernels/integer.h"

namespace rankbook {
namespace {

constexpr int64_t kTokenChunk = 192;       // tokens that share one decoded part; 24 KB of totals
constexpr int64_t kStageTokens = 8;        // tokens that one task rounds
constexpr int64_t kTaskBytes = 1 << 15;    // codes that one task of a single token reads at least
constexpr int64_t kSerialWork = 1 << 17;   // multiply-adds below which waking threads costs more than it gains
constexpr int64_t kFirstBytes = 8192;      // codes to fetch while activations are rounded
constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Job {
  const IntegerArgs& args;
  const IntegerKernels& kernels;
  StagedRows natural;       // order of 8 bits, for the error branch
  StagedRows staged;        // order of the weight's width
  float* ranks = nullptr;   // (M, RP * 32)
  int64_t chunks = 1;       // pieces of kTokenChunk tokens
  int64_t panels = 1;       // panels per task of a single token
};

void run(const Parallel& parallel, int64_t count, int64_t work, void (*task)(void*, int64_t), Job& job) {
  if (count > 1 && work >= kSerialWork && parallel.run != nullptr) {
    parallel.run(parallel.pool, count, task, &job);
    return;
  }
  for (int64_t index = 0; index < count; ++index) task(&job, index);
}

int64_t rank_width(const IntegerBranch& branch) { return ceil_div(branch.rank, kPanel) * kPanel; }

// Rounds tokens [index * kStageTokens, ...) and brings them into order.
void stage_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const IntegerWeight& weight = job.args.weight;
  const int64_t end = least((index + 1) * kStageTokens, job.args.tokens);
  for (int64_t token = index * kStageTokens; token < end; ++token) {
    job.kernels.quantize(weight, job.args.x, token, job.natural, job.staged);
  }
}

// total (tokens, 32) = w[panel] @ the staged tokens [first, first + tokens).
void multiply_panel(const IntegerKernels& kernels, const IntegerWeight& weight, int64_t panel, const StagedRows& x, int64_t first,
                    int64_t tokens, float* total) {
  if (kernels.gemv(weight, panel, x, first, tokens, total)) return;
  alignas(kAlign) int32_t partial[kTokenChunk * kPanel];
  kernels.gemm(weight, panel, x, first, tokens, partial, total);
}

// The first half of the error branch for one panel of ranks and one chunk of tokens.
void branch_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const IntegerBranch& branch = job.args.branch;
  const int64_t panel = index / job.chunks;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = least(job.args.tokens - first, kTokenChunk);
  alignas(kAlign) float total[kTokenChunk * kPanel];
  multiply_panel(job.kernels, branch.down, panel, job.natural, first, tokens, total);
  const int64_t ranks = least(branch.rank - panel * kPanel, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = job.ranks + (first + token) * rank_width(branch) + panel * kPanel;
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = total[token * kPanel + rank] * branch.middle[panel * kPanel + rank];
  }
}

// Adds the error branch and the bias, and writes the rows of the panel that exist.
void finish_panel(const Job& job, int64_t panel, int64_t first, int64_t tokens, float* total) {
  const IntegerArgs& args = job.args;
  if (args.branch.rank > 0) {
    const int64_t width = rank_width(args.branch);
    job.kernels.multiply_up(args.branch.up, panel, args.branch.rank, job.ranks + first * width, width, tokens, total);
  }
  const int64_t n = args.weight.weight.out_features;
  const int64_t row = panel * kPanel;
  const int64_t rows = least(n - row, kPanel);
  for (int64_t token = 0; token < tokens; ++token) {
    float* y = args.y + (first + token) * n + row;
    const float* from = total + token * kPanel;
    if (args.bias == nullptr) {
      std::memcpy(y, from, static_cast<size_t>(rows) * sizeof *y);
    } else {
      for (int64_t i = 0; i < rows; ++i) y[i] = from[i] + args.bias[row + i];
    }
  }
}

void token_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t end = least((index + 1) * job.panels, job.args.weight.weight.panels());
  alignas(kAlign) float total[kPanel];
  const IntegerBranch& branch = job.args.branch;
  for (int64_t panel = index * job.panels; panel < end; ++panel) {
    for (int64_t at = 0; branch.up.codes != nullptr && at < branch.rank * kPanel; at += kAlign) {
      __builtin_prefetch(branch.up.codes + panel * branch.rank * kPanel + at);  // for the end of this panel
    }
    multiply_panel(job.kernels, job.args.weight, panel, job.staged, 0, 1, total);
    finish_panel(job, panel, 0, 1, total);
  }
}

void chunk_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t panels = job.args.weight.weight.panels();
  const int64_t panel = index % panels;  // neighbours share their tokens, which are more bytes than codes
  const int64_t first = index / panels * kTokenChunk;
  const int64_t tokens = least(job.args.tokens - first, kTokenChunk);
  alignas(kAlign) float total[kTokenChunk * kPanel];
  multiply_panel(job.kernels, job.args.weight, panel, job.staged, first, tokens, total);
  finish_panel(job, panel, first, tokens, total);
}

// The loops of one token prefetch as they go; without this the first bytes of a small layer would be waited for.
void prefetch_start(const CodebookWeight& weight) {
  const int64_t bytes = least(weight.panels() * weight.blocks() * weight.bits * kWordBytes, kFirstBytes);
  for (int64_t at = 0; at < bytes; at += kAlign) __builtin_prefetch(weight.codes + at);
}

// Where everything lies in the workspace; returns its size. Without a workspace, the size alone.
int64_t lay_out(const IntegerWeight& weight, const IntegerBranch& branch, int64_t tokens, uint8_t* at, Job* job) {
  const bool both = weight.weight.bits != 8 && branch.rank > 0;  // else activations are brought into order in place
  const int64_t codes = aligned(tokens * weight.staged_bytes());
  const int64_t small = aligned(tokens * weight.weight.groups * 4);
  const int64_t ranks = aligned(tokens * rank_width(branch) * 4);
  if (job != nullptr) {
    job->natural.tokens = tokens;
    job->natural.codes = reinterpret_cast<int8_t*>(at);
    job->natural.sums = reinterpret_cast<int32_t*>(at + codes);
    job->natural.scales = reinterpret_cast<float*>(at + codes + small);
    job->natural.shifts = reinterpret_cast<float*>(at + codes + 2 * small);
    job->ranks = reinterpret_cast<float*>(at + codes + 3 * small);
    job->staged = job->natural;
    if (both) job->staged.codes = reinterpret_cast<int8_t*>(at + codes + 3 * small + ranks);
  }
  return codes + 3 * small + ranks + (both ? codes : 0);
}

}  // namespace

int64_t integer_workspace(const IntegerWeight& weight, const IntegerBranch& branch, int64_t tokens) {
  return lay_out(weight, branch, tokens, nullptr, nullptr);
}

Status integer_linear(const IntegerArgs& args, const IntegerKernels& kernels, const Parallel& parallel) {
  const CodebookWeight& weight = args.weight.weight;
  const Status status = check_weight(weight);
  if (status != Status::kOk || args.tokens == 0) return status;
  if (weight.in_features / weight.groups > kLargestGroup) return Status::kUnsupported;

  Job job{args, kernels, {}, {}};
  lay_out(args.weight, args.branch, args.tokens, args.workspace, &job);
  job.chunks = ceil_div(args.tokens, kTokenChunk);
  const int64_t inputs = args.tokens * weight.in_features;
  if (args.tokens == 1) prefetch_start(weight);
  run(parallel, ceil_div(args.tokens, kStageTokens), inputs * 8, stage_task, job);
  if (args.branch.rank > 0) {
    run(parallel, ceil_div(args.branch.rank, kPanel) * job.chunks, inputs * args.branch.rank, branch_task, job);
  }
  const int64_t work = inputs * weight.out_features;
  if (args.tokens == 1) {
    job.panels = ceil_div(kTaskBytes, weight.blocks() * weight.bits * kWordBytes);
    run(parallel, ceil_div(weight.panels(), job.panels), work, token_task, job);
  } else {
    run(parallel, weight.panels() * job.chunks, work, chunk_task, job);
  }
  return Status::kOk;
}

}  // namespace rankbook
