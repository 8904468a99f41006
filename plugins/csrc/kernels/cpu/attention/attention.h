#pragma once

// Attention of grouped query heads over a cache of keys and values, with the rotary embedding, on a CPU. It computes what
// com.microsoft::GroupQueryAttention of ONNX Runtime computes in fp32; the cache may be of 16-bit floats. No runtime in here, as in codebook.h.
//
// Letters: B rows of the batch, S new tokens of each, N query heads, M heads of keys and values (M divides N), H elements of a
// head, P positions in the past's buffer, L = max(P, total) in the present's.

#include <cstdint>

#include "kernels/cpu/packed/codebook.h"

namespace rankbook {

inline constexpr int64_t kLargestHead = 512;  // elements of a head, a multiple of kHeadStep
inline constexpr int64_t kHeadStep = 8;

// Where query i of row b stands: a prompt (S = total) begins at 0, otherwise its last token is number last[b].
struct AttentionArgs {
  int64_t batch = 0;     // B
  int64_t tokens = 0;    // S
  int64_t heads = 0;     // N
  int64_t kv_heads = 0;  // M
  int64_t size = 0;      // H
  int64_t past = 0;      // P
  int64_t present = 0;   // L
  int64_t total = 0;     // keys in the longest row, new ones included
  const float* query = nullptr;          // (B, S, N * H)
  const float* key = nullptr;            // (B, S, M * H), new
  const float* value = nullptr;          // (B, S, M * H), new
  bool half = false;                     // whether past and present are 16-bit floats; new ones are then read rounded
  const void* past_key = nullptr;        // (B, M, P, H)
  const void* past_value = nullptr;      // (B, M, P, H)
  void* present_key = nullptr;           // (B, M, L, H); nothing is copied where it is past_key
  void* present_value = nullptr;         // (B, M, L, H); nothing is copied where it is past_value
  const int32_t* last = nullptr;         // (B): keys of a row less one, new ones included
  int64_t positions = 0;                 // rows of cos and sin; 0 for no rotary embedding
  const float* cos = nullptr;            // (positions, H / 2)
  const float* sin = nullptr;            // (positions, H / 2)
  const int64_t* position_ids = nullptr; // (B, S), each in [0, positions)
  float scale = 1.0F;                    // factor of products of queries and keys
  float softcap = 0.0F;                  // c: scores become c * tanh(score / c); 0 for none
  int64_t window = -1;                   // keys that a query sees, its own included; -1 for all before it
  float* output = nullptr;               // (B, S, N * H)
  float* workspace = nullptr;            // attention_workspace() floats
};

struct AttentionKernels;  // kernels/dispatch.h

// Floats that attention needs beside its arguments: none for a few tokens.
int64_t attention_workspace(const AttentionArgs& args);

// Writes output, and the new keys (embedded) and values behind the past in present; what a buffer of its own holds behind
// them is cleared. refusal::kLengths: sizes that do not belong together, or
// `last` outside of them; kHead, kPosition.
Status attention(const AttentionArgs& args, const AttentionKernels& kernels, const Parallel& parallel);

}  // namespace rankbook
