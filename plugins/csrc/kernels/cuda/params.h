// Arguments of the CUDA kernels: plain pointers and sizes, no runtime header, so that every runtime's shim can fill them.
//
// Letters: N rows (out features), K columns (in features), G groups, Q parameter planes (the last one is the offset where
// has_offset is set), L = 2^bits levels, R rank of the error branch, M tokens. Byte order: plugins/layout.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/status.h"

namespace rankbook::cuda {

enum class DataType : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kPanel = 32;          // rows side by side in the packed layout
constexpr int kBlock = 32;          // columns per block of the packed layout
constexpr int kMaxPlanes = 4;       // planes of coefficients, the offset not counted
constexpr int kMaxDecodeTokens = 16;  // up to here codes are decoded in the product itself; above, into a dense scratch
constexpr int kMostProducts = 4;    // of one x in one call
constexpr int kWarps = 8;           // warps of a block; they share the columns of one panel

// When a kernel may begin: when the one before it in the stream has ended, or, where the device can do that, while it still
// runs (`wait_for_earlier` of platform.cuh). Early only behind a kernel of the same product or node.
enum class Start { kInTurn, kEarly };

inline int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

using rankbook::Status;

// A floating-point tensor in one of two types.
struct Floats {
  const void* data = nullptr;
  DataType type = DataType::kFloat32;  // kFloat32 or kFloat16
};

// A matrix (N, K) of codes with one codebook per row and group.
struct PackedWeight {
  const std::uint32_t* codes = nullptr;   // (N/32, K/32, bits, 32 rows) words; every byte is stored minus 128
  const std::uint16_t* levels = nullptr;  // (Q, L) fp16
  const std::int8_t* params = nullptr;    // (N/32, G, Q, 32), or a single number
  Floats step;                            // (N/32, Q), or (N/32, G, Q, 32) where step_full
  const float* base = nullptr;            // (N/32, Q), or a single number
  bool params_full = true;
  bool step_full = false;
  bool base_full = true;
  bool has_offset = false;
  int rows = 0;
  int columns = 0;
  int bits = 0;
  int groups = 0;
  int params_planes = 0;  // Q

  constexpr int planes() const { return params_planes - (has_offset ? 1 : 0); }
};

// One factor of the error branch: codes times a scale per rank, or plain values in `scale`.
struct Factor {
  const std::int8_t* codes = nullptr;  // down (R, K), up (N, R), or a single number
  Floats scale;                        // (R), or the shape of the factor where scale_full
  bool codes_full = true;
  bool scale_full = false;
};

// y = x W^T + (x down^T) up^T + bias. Of experts the constants are stacks, one layer behind the other, and every token is
// multiplied by the one that `numbers` says.
struct Matmul {
  PackedWeight weight;
  const float* bias = nullptr;  // (N), or a single number
  bool bias_full = true;
  int rank = 0;  // 0: no error branch
  Factor down;
  Factor up;
  const void* x = nullptr;  // (M, K)
  void* y = nullptr;        // (M, N)
  DataType type = DataType::kFloat32;
  int tokens = 0;
  bool int8_activations = false;  // x rounded per token and group, as plugins/int8.py defines
  int experts = 0;                // in the stack; 0: one layer, no stack
  const std::int64_t* numbers = nullptr;  // (M), each in [0, experts); a token of another number comes out as NaN
  void* workspace = nullptr;  // matmul_workspace() bytes, aligned to 16; every runtime gives 256
};

// y[i] = W[indices[i]], float32; a row outside [0, N) comes out as NaN
struct Gather {
  PackedWeight weight;
  const std::int64_t* indices = nullptr;
  float* y = nullptr;
  std::int64_t count = 0;
};

}  // namespace rankbook::cuda
