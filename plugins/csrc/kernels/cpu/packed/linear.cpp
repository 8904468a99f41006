// Drives the inner loops: which panels, in which order, on which thread. Two paths. One token reads each code once and
// multiplies as it goes (memory bound). More tokens decode a slice of a panel into the L1 cache and multiply that.

#include <cstring>

#include "kernels/cpu/packed/codebook.h"
#include "kernels/cpu/dispatch.h"

namespace rankbook {
namespace {

// Sizes of the path for many tokens. A decoded slice and a tile of x must stay in the L1 cache (32 KB on the smallest
// processor served) while every tile of tokens passes over them; the accumulators of a chunk live in L2.
constexpr int64_t kDepth = 128;            // inputs decoded at a time: 16 KB of fp32, half of a small L1
constexpr int64_t kTokenChunk = 192;       // tokens that share one decoded slice; 24 KB of accumulators
constexpr int64_t kSerialWork = 1 << 16;   // multiply-adds below which waking threads costs more than it gains

struct Job {
  const LinearArgs& args;
  const PanelKernels& kernels;
  const float* x;           // (M, K), or (1, KB * 32) zero-padded
  float* group_sums;        // (G), one token only
  float* branch;            // (M, RP * 32): (x @ down.T) * middle
  int64_t chunks;           // pieces of kTokenChunk tokens
};

void run(const Parallel& parallel, int64_t count, int64_t work, void (*task)(void*, int64_t), Job& job) {
  if (count > 1 && work >= kSerialWork && parallel.run != nullptr) {
    parallel.run(parallel.pool, count, task, &job);
    return;
  }
  for (int64_t index = 0; index < count; ++index) task(&job, index);
}

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
void branch_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const LowRankBranch& branch = job.args.branch;
  const int64_t width = ceil_div(branch.rank, kPanel) * kPanel;
  const int64_t panel = index / job.chunks;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = job.args.tokens - first < kTokenChunk ? job.args.tokens - first : kTokenChunk;
  const int64_t depth = job.args.weight.in_features;
  alignas(64) float acc[kTokenChunk * kPanel];
  clear(acc, tokens * kPanel);
  multiply_factor(job.kernels, branch.down, panel, depth, job.x + first * depth, depth, tokens, acc);
  const int64_t ranks = branch.rank - panel * kPanel < kPanel ? branch.rank - panel * kPanel : kPanel;
  for (int64_t token = 0; token < tokens; ++token) {
    float* to = job.branch + (first + token) * width + panel * kPanel;
    for (int64_t rank = 0; rank < ranks; ++rank) to[rank] = acc[token * kPanel + rank] * branch.middle[panel * kPanel + rank];
  }
}

// The second factor goes into the accumulators of the panel while they are in the L1 cache; y is written once.
// Adds the error branch and the bias, and writes the rows of the panel that exist.
void finish_panel(const Job& job, int64_t panel, int64_t first, int64_t tokens, float* acc) {
  const LinearArgs& args = job.args;
  if (args.branch.rank > 0) {
    const int64_t width = ceil_div(args.branch.rank, kPanel) * kPanel;
    multiply_factor(job.kernels, args.branch.up, panel, args.branch.rank, job.branch + first * width, width, tokens, acc);
  }
  const int64_t n = args.weight.out_features;
  const int64_t row = panel * kPanel;
  const int64_t rows = n - row < kPanel ? n - row : kPanel;
  for (int64_t token = 0; token < tokens; ++token) {
    float* y = args.y + (first + token) * n + row;
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
void token_task(void* argument, int64_t panel) {
  const Job& job = *static_cast<const Job*>(argument);
  alignas(64) float acc[kPanel];
  clear(acc, kPanel);
  job.kernels.gemv(job.args.weight, panel, job.x, job.group_sums, acc);
  finish_panel(job, panel, 0, 1, acc);
}

// Tasks run over panels first and chunks of tokens last: threads that work at the same time share the tokens they read.
void chunk_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const CodebookWeight& weight = job.args.weight;
  const int64_t panel = index / job.chunks;
  const int64_t first = index % job.chunks * kTokenChunk;
  const int64_t tokens = job.args.tokens - first < kTokenChunk ? job.args.tokens - first : kTokenChunk;
  const int64_t depth = weight.in_features;
  alignas(64) float slice[kDepth * kPanel];
  alignas(64) float acc[kTokenChunk * kPanel];
  clear(acc, tokens * kPanel);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t count = depth - k < kDepth ? depth - k : kDepth;
    job.kernels.decode(weight, panel, k, k + ceil_div(count, kHalfBlock) * kHalfBlock, slice);
    job.kernels.gemm(job.x + first * depth + k, depth, tokens, slice, count, acc);
  }
  finish_panel(job, panel, first, tokens, acc);
}

// Group sums are plain code: they are 1 / N of the product's work, and their order is the same on every instruction set.
// Copies one token into `padded` (zeros behind K) and sums it per group.
// The copy costs K stores and lets the loop read whole blocks without looking at the end of the row. The sums belong to
// the offset: sum_k offset * x_k is offset times the sum of x, once a group.
void stage_token(const LinearArgs& args, float* padded, float* group_sums) {
  const CodebookWeight& weight = args.weight;
  const int64_t group = weight.in_features / weight.groups;
  for (int64_t k = 0; k < weight.in_features; ++k) padded[k] = args.x[k];
  clear(padded + weight.in_features, weight.blocks() * kBlock - weight.in_features);
  for (int64_t g = 0; g < weight.groups; ++g) {
    float sum = 0.0F;
    for (int64_t k = g * group; k < (g + 1) * group; ++k) sum += padded[k];
    group_sums[g] = sum;
  }
}

}  // namespace

Status check_weight(const CodebookWeight& weight) {
  if (weight.bits != 2 && weight.bits != 3 && weight.bits != 4 && weight.bits != 8) return refusal::kBits;
  if (weight.out_features <= 0 || weight.in_features <= 0 || weight.planes <= 0) return refusal::kEmpty;
  if (weight.groups <= 0 || weight.in_features % weight.groups != 0) return refusal::kDivision;
  const int64_t group = weight.in_features / weight.groups;
  return weight.groups == 1 || group % kHalfBlock == 0 ? Status{} : refusal::kGroups;
}

int64_t linear_workspace(const CodebookWeight& weight, const LowRankBranch& branch, int64_t tokens) {
  const int64_t staged = tokens == 1 ? weight.blocks() * kBlock + weight.groups : 0;
  return staged + tokens * ceil_div(branch.rank, kPanel) * kPanel;
}

Status codebook_linear(const LinearArgs& args, const PanelKernels& kernels, const Parallel& parallel) {
  const CodebookWeight& weight = args.weight;
  const Status status = check_weight(weight);
  if (!status.ok() || args.tokens == 0) return status;

  Job job{args, kernels, args.x, nullptr, args.workspace, ceil_div(args.tokens, kTokenChunk)};
  if (args.tokens == 1) {
    float* padded = args.workspace + ceil_div(args.branch.rank, kPanel) * kPanel;
    job.group_sums = padded + weight.blocks() * kBlock;
    stage_token(args, padded, job.group_sums);
    job.x = padded;
  }
  if (args.branch.rank > 0) {
    const int64_t tasks = ceil_div(args.branch.rank, kPanel) * job.chunks;
    run(parallel, tasks, args.tokens * args.branch.rank * weight.in_features, branch_task, job);
  }
  const int64_t work = args.tokens * weight.out_features * weight.in_features;
  run(parallel, weight.panels() * job.chunks, work, args.tokens == 1 ? token_task : chunk_task, job);
  return {};
}

}  // namespace rankbook
