// Drives the inner loops: which panels of which products, in which order, on which thread. Two paths. One token reads each
// code once and multiplies as it goes (memory bound). More tokens decode a slice of a panel into the L1 cache and multiply that.

#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/packed/codebook.h"
#include "kernels/cpu/tasks.h"

namespace rankbook {
namespace {

// Sizes of the path for many tokens. A decoded slice and a tile of x must stay in the L1 cache (32 KB on the smallest
// processor served) while every tile of tokens passes over them; the accumulators of a chunk live in L2.
constexpr int64_t kDepth = 128;            // inputs decoded at a time: 16 KB of fp32, half of a small L1
constexpr int64_t kTokenChunk = 192;       // tokens that share one decoded slice; 24 KB of accumulators
constexpr int64_t kSerialWork = 1 << 16;   // multiply-adds below which waking threads costs more than it gains

struct Job {
  const LinearArgs* args;
  const PanelKernels* kernels;
  const float* x;           // (M, K), or (1, KB * 32) zero-padded
  float* staged;            // the same where x is a copy
  float* group_sums;        // (G), one token only
  float* branch;            // (M, RP * 32): (x @ down.T) * middle
  int64_t chunks;           // pieces of kTokenChunk tokens
  int64_t first;            // of its tasks among those of all jobs

  int64_t tokens() const { return args->tokens; }
  int64_t row(int64_t token) const { return args->rows == nullptr ? token : args->rows[token]; }
};

// acc (tokens, 32) += x (tokens, depth) @ factor (depth, 32).
// The factors of the branch take the same loop as decoded weights: 32 outputs side by side, so that no second kind of
// kernel is needed for what is 3 % of the bytes of a large layer and 14 % of a small one at rank 32.
void multiply_factor(const PanelKernels& kernels, const PanelFactor& factor, int64_t panel, int64_t depth, const float* x,
                     int64_t stride, int64_t tokens, float* acc) {
  alignas(64) float slice[kDepth * kPanel];
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t count = depth - k < kDepth ? depth - k : kDepth;
    const int64_t at = (panel * depth + k) * kPanel;
    const float* w = slice;
    if (factor.codes != nullptr) {
      kernels.expand(factor.codes + at, count * kPanel, slice);
    } else {
      w = factor.values + at;
    }
    kernels.gemm(x + k, stride, tokens, w, count, acc);
  }
}

// A loop and not memset: the compiler makes vector stores of known alignment of it, and for one token these are 128
// bytes.
void clear(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0.0F;
}

// The first half of the error branch for one panel of ranks and one chunk of tokens.
// Its own pass before the product, because every panel of the weight needs all ranks. The scales of both factors
// (`middle`) are applied here, R multiplications a token.
void branch_task(Job& job, int64_t index) {
  const LowRankBranch& branch = job.args->branch;
  const int64_t width = ceil_div(branch.rank, kPanel) * kPanel;
  const int64_t panel = index / job.chunks;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = job.tokens() - first < kTokenChunk ? job.tokens() - first : kTokenChunk;
  const int64_t depth = job.args->weight.in_features;
  alignas(64) float acc[kTokenChunk * kPanel];
  clear(acc, tokens * kPanel);
  multiply_factor(*job.kernels, branch.down, panel, depth, job.x + first * depth, depth, tokens, acc);
  const int64_t ranks = branch.rank - panel * kPanel < kPanel ? branch.rank - panel * kPanel : kPanel;
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = job.branch + (first + token) * width + panel * kPanel;
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = acc[token * kPanel + rank] * branch.middle[panel * kPanel + rank];
  }
}

// The second factor goes into the accumulators of the panel while they are in the L1 cache; y is written once.
// Adds the error branch and the bias, and writes the rows of the panel that exist.
void finish_panel(const Job& job, int64_t panel, int64_t first, int64_t tokens, float* acc) {
  const LinearArgs& args = *job.args;
  if (args.branch.rank > 0) {
    const int64_t width = ceil_div(args.branch.rank, kPanel) * kPanel;
    multiply_factor(*job.kernels, args.branch.up, panel, args.branch.rank, job.branch + first * width, width, tokens, acc);
  }
  const int64_t n = args.weight.out_features;
  const int64_t row = panel * kPanel;
  const int64_t rows = n - row < kPanel ? n - row : kPanel;
  for (int64_t token = 0; token < tokens; ++token) {
    float* y = args.y + job.row(first + token) * n + row;
    const float* from = acc + token * kPanel;
    if (args.bias == nullptr) {
      std::memcpy(y, from, static_cast<size_t>(rows) * sizeof *y);
    } else {
      for (int64_t i = 0; i < rows; ++i) y[i] = from[i] + args.bias[row + i];
    }
  }
}

// A task is one panel, the smallest piece that finishes its outputs by itself: no split over inputs is needed on a CPU,
// since even 576 rows are 18 panels.
void token_task(const Job& job, int64_t panel) {
  alignas(64) float acc[kPanel];
  clear(acc, kPanel);
  job.kernels->gemv(job.args->weight, panel, job.x, job.group_sums, acc);
  finish_panel(job, panel, 0, 1, acc);
}

// Tasks run over panels first and chunks of tokens last: threads that work at the same time share the tokens they read.
void chunk_task(const Job& job, int64_t index) {
  const CodebookWeight& weight = job.args->weight;
  const int64_t panel = index / job.chunks;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = job.tokens() - first < kTokenChunk ? job.tokens() - first : kTokenChunk;
  const int64_t depth = weight.in_features;
  alignas(64) float slice[kDepth * kPanel];
  alignas(64) float acc[kTokenChunk * kPanel];
  clear(acc, tokens * kPanel);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t count = depth - k < kDepth ? depth - k : kDepth;
    job.kernels->decode(weight, panel, k, k + ceil_div(count, kHalfBlock) * kHalfBlock, slice);
    job.kernels->gemm(job.x + first * depth + k, depth, tokens, slice, count, acc);
  }
  finish_panel(job, panel, first, tokens, acc);
}

void product_task(Job& job, int64_t index) { job.tokens() == 1 ? token_task(job, index) : chunk_task(job, index); }

// Copies a token where x is not read in place; one alone with zeros behind K, and summed per group.
// That copy costs K stores and lets the loop read whole blocks without looking at the end of the row. The sums belong to
// the offset: sum_k offset * x_k is offset times the sum of x, once a group. They are plain code: 1 / N of the product's
// work, in the same order on every instruction set.
void stage_task(Job& job, int64_t token) {
  const CodebookWeight& weight = job.args->weight;
  const int64_t k = weight.in_features;
  float* const to = job.staged + token * k;
  std::memcpy(to, job.args->x + job.row(token) * k, static_cast<size_t>(k) * sizeof *to);
  if (job.tokens() > 1) return;
  clear(to + k, weight.blocks() * kBlock - k);
  const int64_t group = k / weight.groups;
  for (int64_t g = 0; g < weight.groups; ++g) {
    float sum = 0.0F;
    for (int64_t at = g * group; at < (g + 1) * group; ++at) sum += to[at];
    job.group_sums[g] = sum;
  }
}

bool is_staged(const LinearArgs& args) { return args.tokens == 1 || args.rows != nullptr; }

// Where everything lies in the workspace; returns its size. Without a workspace, the size alone.
int64_t lay_out(const LinearArgs* args, int64_t count, uint8_t* workspace, const PanelKernels* kernels, Job** jobs) {
  Cutter cutter(workspace);
  *jobs = cutter.take<Job>(count);
  for (int64_t i = 0; i < count; ++i) {
    const LinearArgs& one = args[i];
    const int64_t padded = one.tokens == 1 ? one.weight.blocks() * kBlock : one.tokens * one.weight.in_features;
    float* const staged = is_staged(one) ? cutter.take<float>(padded) : nullptr;
    float* const sums = one.tokens == 1 ? cutter.take<float>(one.weight.groups) : nullptr;
    float* const branch = cutter.take<float>(one.tokens * ceil_div(one.branch.rank, kPanel) * kPanel);
    if (workspace == nullptr) continue;
    const float* const x = is_staged(one) ? staged : one.x;
    (*jobs)[i] = {&one, kernels, x, staged, sums, branch, ceil_div(one.tokens, kTokenChunk), 0};
  }
  return cutter.size();
}

int64_t stage_tasks(const Job& job) { return is_staged(*job.args) ? job.tokens() : 0; }
int64_t branch_tasks(const Job& job) { return ceil_div(job.args->branch.rank, kPanel) * job.chunks; }
int64_t product_tasks(const Job& job) { return job.args->weight.panels() * job.chunks; }

}  // namespace

Status check_weight(const CodebookWeight& weight) {
  if (weight.bits != 2 && weight.bits != 3 && weight.bits != 4 && weight.bits != 8) return refusal::kBits;
  if (weight.out_features <= 0 || weight.in_features <= 0 || weight.planes <= 0) return refusal::kEmpty;
  if (weight.groups <= 0 || weight.in_features % weight.groups != 0) return refusal::kDivision;
  const int64_t group = weight.in_features / weight.groups;
  return weight.groups == 1 || group % kHalfBlock == 0 ? Status{} : refusal::kGroups;
}

int64_t linear_workspace(const LinearArgs* args, int64_t count) {
  Job* none = nullptr;
  return lay_out(args, count, nullptr, nullptr, &none);
}

Status codebook_linear(const LinearArgs* args, int64_t count, uint8_t* workspace, const PanelKernels& kernels,
                       const Parallel& parallel) {
  int64_t inputs = 0, branch = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Status status = check_weight(args[i].weight);
    if (!status.ok()) return status;
    const int64_t tokens = args[i].tokens * args[i].weight.in_features;
    inputs += tokens;
    branch += tokens * args[i].branch.rank;
    work += tokens * args[i].weight.out_features;
  }
  Job* jobs = nullptr;
  lay_out(args, count, workspace, &kernels, &jobs);
  run_jobs(parallel, jobs, count, inputs * 8, kSerialWork, stage_tasks, stage_task);
  run_jobs(parallel, jobs, count, branch, kSerialWork, branch_tasks, branch_task);
  run_jobs(parallel, jobs, count, work, kSerialWork, product_tasks, product_task);
  return {};
}

}  // namespace rankbook
