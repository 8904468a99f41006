#pragma once

#include <cstdint>

#include "kernels/cpu/attention/attention.h"
#include "kernels/cpu/groups/groups.h"
#include "kernels/cpu/packed/codebook.h"
#include "kernels/cpu/int8/int8.h"

namespace rankbook {

// The inner loops, built once per instruction set from packed/kernels.h. A panel is 32 output rows.
struct PanelKernels {
  const char* name;

  // One token: y (32) += w[panel] @ x. x is zero-padded to whole blocks, group_sums (G) holds the sums of x per group.
  void (*gemv)(const CodebookWeight& weight, int64_t panel, const float* x, const float* group_sums, float* y);

  // Decodes inputs [k0, k1) of a panel to fp32, out (k1 - k0, 32). k0 and k1 are multiples of 16 (k1 may pass K).
  void (*decode)(const CodebookWeight& weight, int64_t panel, int64_t k0, int64_t k1, float* out);

  // acc (M, 32) += x (M, depth; rows stride apart) @ w (depth, 32).
  void (*gemm)(const float* x, int64_t stride, int64_t tokens, const float* w, int64_t depth, float* acc);

  // out[i] = codes[i] for count values, count a multiple of 32.
  void (*expand)(const int8_t* codes, int64_t count, float* out);
};

// The inner loops of the int8 mode, built once per instruction set from int8/kernels.h.
struct Int8Kernels {
  const char* name;
  int unsigned_range;  // levels of a larger range need signed tables

  // Rounds x (K) to int8, zeros around each group, as this token of `natural` in the order of 8 bits, and of `staged` in that
  // of the weight unless that is the same.
  void (*quantize)(const Int8Weight& weight, const float* x, int64_t token, const StagedRows& natural,
                   const StagedRows& staged);

  // A few tokens and the panels from `panel` on: y (panels, tokens, 32) = w[panel] @ x[first ... first + tokens). False if
  // gemm is better or there is no such loop.
  bool (*gemv)(const Int8Weight& weight, int64_t panel, int64_t panels, const StagedRows& x, int64_t first, int64_t tokens,
               float* y);

  // total (tokens, 32) = w[panel] @ x[first ... first + tokens). `partial` has room for as many int32.
  void (*gemm)(const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t first, int64_t tokens,
               int32_t* partial, float* total);

  // total (M, 32) += ranks (M, R; rows stride apart) @ up[panel] (R, 32).
  void (*multiply_up)(const PanelFactor& up, int64_t panel, int64_t rank, const float* ranks, int64_t stride, int64_t tokens,
                      float* total);
};

inline constexpr int kTileRows = 12;         // rows of queries that go through the keys together, at most
inline constexpr int64_t kKeyBlock = 128;    // keys between two looks at the maximum of the scores
inline constexpr int64_t kKeyPanel = 32;     // keys side by side where they are transposed

// Rows of queries that share one head of keys and values.
struct AttentionTile {
  int64_t rows;           // at most AttentionKernels::rows
  int64_t size;           // H
  int64_t stride;         // of q and out: H rounded up to whole vectors
  const float* q;         // (rows, stride), times the scale, over the softcap or times log2(e)
  float* out;             // (rows, stride)
  const int64_t* begin;   // (rows): the first key that a row sees
  const int64_t* end;     // (rows): one behind the last
  float cap;              // softcap times log2(e), or 0
  bool half;              // whether keys and values are 16-bit floats
  const void* keys;       // (positions, H)
  const void* values;     // (positions, H)
  const float* panels;    // keys as (panels, H, kKeyPanel), zeros behind the last, or null
};

// The inner loops of attention, built once per instruction set from attention/kernels.h.
struct AttentionKernels {
  const char* name;
  int rows;  // of a tile

  // out = softmax(q @ keys.T) @ values.
  void (*attend)(const AttentionTile& tile);

  // out (H) = x (H) * factor after the rotary embedding with cos and sin (H / 2), which may be null.
  void (*embed)(const float* x, const float* cos, const float* sin, int64_t size, float factor, float* out);

  // out (count) = x (count) as 16-bit floats.
  void (*narrow)(const float* x, int64_t count, uint16_t* out);
};

// What works on rows between products, built once per instruction set from rows/kernels.h.
struct RowKernels {
  const char* name;

  // sum = a + b, y = sum / sqrt(mean(sum^2) + epsilon) * scale, all of `size` elements.
  void (*add_norm)(const float* a, const float* b, const float* scale, int64_t size, float epsilon, float* y, float* sum);

  // y = gate * sigmoid(gate) * up; within 3e-7 of it relatively.
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* y);
};

// Weights in groups while a layer is quantized, built once per instruction set from groups/kernels.h; the first three for one
// group.
struct GroupKernels {
  const char* name;
  void (*round)(const RoundGroups& of, int64_t index);
  void (*step)(const StepGroups& of, int64_t index);
  void (*moments)(const MomentGroups& of, int64_t index);
  void (*feedback)(const FeedbackColumns& of, int64_t first, int64_t last);  // rows of the matrix
};

// In this order; each includes those before it. kBest stands for the last.
#if defined(RANKBOOK_ARM)
enum class Isa { kPortable, kNeon, kDotProd, kBest = kDotProd };
inline constexpr const char* kIsaNames[] = {"portable", "neon", "dotprod"};
#else
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512, kAmx, kBest = kAmx };
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avxvnni", "avx512", "amx"};
#endif

// What one instruction set brings (kernels/cpu/sets/), a translation unit each; null where a lesser one serves as well.
struct KernelSet {
  const PanelKernels* packed;
  const Int8Kernels* int8;
  const AttentionKernels* attention;
  const RowKernels* rows;
  const GroupKernels* groups;
};

// What RANKBOOK_NATIVE_ISA, one of kIsaNames, allows, so that tests reach every kernel; false where it is another word.
bool read_limit(Isa& limit);

// The best of each that this processor can run, none better than `limit`.
KernelSet select_kernels(Isa limit = Isa::kBest);

extern const KernelSet kPortableSet;
#if defined(RANKBOOK_X86)
extern const KernelSet kAvx2Set, kAvxVnniSet, kAvx512Set, kAvx512VnniSet, kAmxSet;
#elif defined(RANKBOOK_ARM)
extern const KernelSet kNeonSet, kDotProdSet;
#endif

}  // namespace rankbook
