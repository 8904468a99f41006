#pragma once

#include <cstdint>

#include "kernels/codebook.h"

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

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best kernels that this processor can run, none better than `limit`.
const PanelKernels& select_kernels(Isa limit = Isa::kAvx512);

const PanelKernels& portable_kernels();
#if defined(RANKBOOK_X86)
const PanelKernels& avx2_kernels();
const PanelKernels& avx512_kernels();
#endif

}  // namespace rankbook
