#pragma once

#include <cstdint>

#include "kernels/codebook.h"
#include "kernels/integer.h"

namespace rankbook {

// The inner loops, built once per instruction set from panel_kernels.h. A panel is 32 output rows.
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

// One plane of one group, or a part of it, for the tokens of a chunk.
struct IntegerTile {
  const int8_t* x;         // staged activations of the first token at the first block
  int64_t stride;          // bytes between tokens
  const uint8_t* entries;  // (blocks, 8, 32, 4) from decode
  int64_t blocks;
  bool is_signed;
  int32_t centre;
  int64_t groups;          // between tokens in sums and scales
  const int32_t* sums;     // of this group, first token
  const float* scales;
  const float* value;      // (32)
  const float* offset;     // (32) added with this tile, or null
  int32_t* partial;        // (tokens, 32) integer sums between the parts of a long group
  bool first, last;        // part of the group
  float* total;            // (tokens, 32)
};

// The inner loops of the int8 mode, built once per instruction set from integer_kernels.h.
struct IntegerKernels {
  const char* name;
  int unsigned_range;  // levels of a larger range need signed tables

  // One token to int8 in the natural order, (G, group_blocks, 32) with zeros around each group.
  void (*quantize)(const IntegerWeight& weight, const float* x, int8_t* out, int32_t* sums, float* scales);

  // Blocks of 32 activations from the natural order to that of 2, 3 or 4 bits (8 bits have the natural one).
  void (*stage)(int bits, const int8_t* natural, int64_t blocks, int8_t* out);

  // One token: y (32) = w[panel] @ x. False if there is no such loop: gemm does it.
  bool (*gemv)(const IntegerWeight& weight, int64_t panel, const StagedRows& x, float* y);

  // Table entries of blocks [block, block + blocks) of one plane, out (blocks, 8, 32, 4).
  void (*decode)(const IntegerWeight& weight, int64_t panel, int plane, int64_t block, int64_t blocks, uint8_t* out);

  // Parameters of the 32 rows for one group and plane.
  void (*values)(const IntegerWeight& weight, int64_t panel, int64_t group, int64_t plane, float* out);

  void (*gemm)(const IntegerTile& tile, int64_t tokens);

  // total (M, 32) += ranks (M, R; rows stride apart) @ up[panel] (R, 32).
  void (*multiply_up)(const PanelFactor& up, int64_t panel, int64_t rank, const float* ranks, int64_t stride, int64_t tokens,
                      float* total);
};

// In this order; each includes those before it.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512 };

// The best kernels that this processor can run, none better than `limit`.
const PanelKernels& select_kernels(Isa limit = Isa::kAvx512);
const IntegerKernels& select_integer_kernels(Isa limit = Isa::kAvx512);

const PanelKernels& portable_kernels();
const IntegerKernels& portable_integer_kernels();
#if defined(RANKBOOK_X86)
const PanelKernels& avx2_kernels();
const PanelKernels& avx512_kernels();
const IntegerKernels& avx2_integer_kernels();
const IntegerKernels& avxvnni_integer_kernels();
const IntegerKernels& avx512_integer_kernels();
#endif

}  // namespace rankbook
