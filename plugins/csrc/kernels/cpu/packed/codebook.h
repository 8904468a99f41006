#pragma once

// Linear layers and row lookups whose weight is stored as codes into low-rank codebooks, on a CPU. No runtime in here:
// pointers, sizes and a callback for threads.
//
// Letters: N out features, K in features, M tokens, NP = ceil(N / 32) panels, KB = ceil(K / 32) blocks, G groups of a
// row, Q parameter planes, P = Q less the offset, R rank of the error branch, RP = ceil(R / 32), b bits.
//
//     w[n, k] = sum_p value[n, g, p] * levels[p, code[n, k]] + value[n, g, offset],   g = k / (K / G)

#include <cstdint>

#include "kernels/status.h"

// Small functions that translation units of different instruction sets share must never be emitted on their own, or the
// linker might keep the copy that only a newer processor can run.
#define RANKBOOK_INLINE inline __attribute__((always_inline))

namespace rankbook {

inline constexpr int64_t kPanel = 32;       // output rows side by side
inline constexpr int64_t kBlock = 32;       // inputs of one block of b words per row
inline constexpr int64_t kHalfBlock = 16;   // what group sizes are multiples of
inline constexpr int64_t kWordBytes = kPanel * 4;

RANKBOOK_INLINE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

enum class ParamForm {
  kInt8,     // value = params * step + base, one step and base per panel and plane
  kFloat16,  // the values themselves
  kFloat32,
};

// A weight as the file holds it. Nothing is repacked: codes and params are read where the runtime has them.
struct CodebookWeight {
  int bits = 0;               // 2, 3, 4 or 8
  bool has_offset = false;    // the last parameter plane is added, its levels are one
  int64_t out_features = 0;   // N
  int64_t in_features = 0;    // K
  int64_t groups = 0;         // G; K / G is a multiple of 16, or G is 1
  int planes = 0;             // P: rows of levels, the offset not counted
  const uint8_t* codes = nullptr;  // (NP, KB, b, 32, 4), each byte with its top bit flipped (INT8 carrier of byte - 128)
  const float* levels = nullptr;   // (P, 2^b)
  const float* slopes = nullptr;   // (P, 2): levels[c] = first + second * c exactly, or null; 8 bits only
  ParamForm form = ParamForm::kInt8;
  const void* params = nullptr;    // (NP, G, Q, 32) in the type that form says
  const float* step = nullptr;     // (NP, Q), kInt8 only
  const float* base = nullptr;     // (NP, Q), kInt8 only

  RANKBOOK_INLINE int64_t panels() const { return ceil_div(out_features, kPanel); }
  RANKBOOK_INLINE int64_t blocks() const { return ceil_div(in_features, kBlock); }
  RANKBOOK_INLINE int64_t param_planes() const { return planes + (has_offset ? 1 : 0); }
};

// One factor of the error branch in panel order, so that a vector holds neighbouring outputs: (panels, depth, 32).
struct PanelFactor {
  const int8_t* codes = nullptr;   // or
  const float* values = nullptr;
};

// Adds ((x @ down.T) * middle) @ up.T.
struct LowRankBranch {
  int64_t rank = 0;         // R; 0 means none
  PanelFactor down;         // (RP, K, 32)
  PanelFactor up;           // (NP, R, 32)
  const float* middle = nullptr;  // (R): the scales of both factors, multiplied
};

// How the caller's thread pool runs tasks 0 ... count - 1; returns when all are done.
struct Parallel {
  void* pool = nullptr;
  void (*run)(void* pool, int64_t count, void (*task)(void* argument, int64_t index), void* argument) = nullptr;
};

struct LinearArgs {
  CodebookWeight weight;
  LowRankBranch branch;
  const float* bias = nullptr;  // (N), or null
  const float* x = nullptr;     // (M, K)
  int64_t tokens = 0;           // M
  float* y = nullptr;           // (M, N)
  const int64_t* rows = nullptr;  // (M): which row of x and of y each token is, or null: all of them in order
};

struct GatherArgs {
  CodebookWeight weight;
  const int64_t* indices = nullptr;  // (M), each in [0, N)
  int64_t count = 0;                 // M
  float* y = nullptr;                // (M, K)
};

struct PanelKernels;  // kernels/dispatch.h

// Bytes that codebook_linear needs beside its arguments.
int64_t linear_workspace(const LinearArgs* args, int64_t count);

// y = x @ w.T + branch + bias in fp32, of `count` products at once: the parity mode, within fp32 rounding of the reference.
// `workspace` is aligned to 64.
Status codebook_linear(const LinearArgs* args, int64_t count, uint8_t* workspace, const PanelKernels& kernels,
                       const Parallel& parallel);

// y[m] = w[indices[m]].
Status codebook_gather(const GatherArgs& args, const Parallel& parallel);

// Whether the sizes belong together; every entry point checks it.
Status check_weight(const CodebookWeight& weight);

}  // namespace rankbook
