// The product for many tokens: the weight decoded once into a dense scratch (decode_dense), then a tiled product.
//
// Called for fp32, for three and four planes, for rows that are no multiple of 8 inputs and for 3-bit groups that cut a
// unit: what prefill_mma does not take. y is written with branch and bias; sums are fp32 in a fixed order, so results
// repeat.
//
// Plain tiles of 15 KB in two stages. Nothing here is tuned for Hopper (wgmma), since the fast ways go past this file.
#pragma once

#include "kernels/cuda/branch.cuh"

namespace rankbook::cuda {

// Tensor-core tiles: 128 tokens x 64 rows x 32 inputs. Eight warps, 4 x 2, each 32 x 32 outputs.
// Sizes: x and W tiles of one stage are 15 KB with padding, two stages 30 KB, so that three blocks fit the shared
// memory of a multiprocessor; a warp's 32 x 32 outputs are 32 registers of sums.
struct MmaTile {
  static constexpr int kTokens = 128, kRows = 64, kDepth = 32;
  static constexpr int kStride = kDepth + 8;  // elements; 80 bytes put the eight fragment rows into distinct banks
  static constexpr int kStage = (kTokens + kRows) * kStride;  // elements
  static constexpr std::size_t kBytes = 2 * kStage * sizeof(std::uint16_t);
};

// Eight neighbouring elements of row `row`, zero outside the matrix.
// Rows of x need not be multiples of eight elements here: then element by element.
RB_DEVICE uint4 load_eight(const std::uint16_t* matrix, int row, int rows, int k, int columns) {
  uint4 v = {0u, 0u, 0u, 0u};
  if (row >= rows || k >= columns) return v;
  const std::uint16_t* at = matrix + static_cast<std::size_t>(row) * columns + k;
  if ((columns & 7) == 0) return load_fresh(reinterpret_cast<const uint4*>(at));
  std::uint32_t words[4] = {0u, 0u, 0u, 0u};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (k + i < columns) words[i / 2] |= static_cast<std::uint32_t>(load_fresh(at + i)) << (16 * (i % 2));
  }
  v.x = words[0], v.y = words[1], v.z = words[2], v.w = words[3];
  return v;
}

// What one thread carries from global to shared memory per step: two pieces of x, one of W.
// Through registers and not by asynchronous copies: rows that are not aligned to 16 bytes, which this path is for,
// cannot be copied that way, and Turing has none.
struct MmaPieces {
  uint4 x[2], w;

  RB_DEVICE void read(const MatmulKernel& arguments, int first_token, int first_row, int k) {
    const Matmul& m = arguments.m;
    const int line = thread_index() / 4, column = k + 8 * (thread_index() % 4);
    const auto* from = static_cast<const std::uint16_t*>(m.x);
    x[0] = load_eight(from, first_token + line, m.tokens, column, m.weight.columns);
    x[1] = load_eight(from, first_token + 64 + line, m.tokens, column, m.weight.columns);
    w = load_eight(static_cast<const std::uint16_t*>(arguments.dense), first_row + line, arguments.dense_rows, column,
                   m.weight.columns);
  }

  // A row of 32 elements is 80 bytes apart from the next: 16-byte writes of eight threads, and the 4-byte reads of the
  // eight rows of a fragment, meet distinct banks.
  RB_DEVICE void write(std::uint16_t* stage) const {
    std::uint16_t* at = stage + thread_index() / 4 * MmaTile::kStride + 8 * (thread_index() % 4);
    *reinterpret_cast<uint4*>(at) = x[0];
    *reinterpret_cast<uint4*>(at + 64 * MmaTile::kStride) = x[1];
    *reinterpret_cast<uint4*>(at + MmaTile::kTokens * MmaTile::kStride) = w;
  }
};

// Fragments are read word by word instead of by ldmatrix, four instructions instead of one. This path is for what the
// others do not take, and its time is the dense weight's way through memory: 2 N K bytes written and read.
RB_DEVICE std::uint32_t shared_pair(const std::uint16_t* line, int row, int column) {
  return *reinterpret_cast<const std::uint32_t*>(line + row * MmaTile::kStride + column);
}

// Here tokens are operand A and weights operand B, as in any GEMM: with many tokens there is nothing to save by the
// other order.
template <typename T>
RB_DEVICE void multiply_stage(const std::uint16_t* stage, int token, int row, float (&sums)[2][4][4]) {
  const int p = (thread_index() & 31) >> 2, q = thread_index() & 3;
  const std::uint16_t* weights = stage + MmaTile::kTokens * MmaTile::kStride;
#pragma unroll
  for (int k = 0; k < MmaTile::kDepth; k += 16) {
    std::uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        a[i][s] = shared_pair(stage, token + 16 * i + p + 8 * (s % 2), k + 2 * q + 8 * (s / 2));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t b0 = shared_pair(weights, row + 8 * j + p, k + 2 * q);
      const std::uint32_t b1 = shared_pair(weights, row + 8 * j + p, k + 2 * q + 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) T::mma(sums[i][j], a[i], b0, b1);
    }
  }
}

// One output: row n of the decoded part of the weight.
// The branch is added in plain fp32, R multiply-adds an output, where the main loop has K / 8 of them per lane and
// product.
template <typename T>
RB_DEVICE void store_product(const MatmulKernel& arguments, int token, int n, float sum) {
  const int row = arguments.first_row + n;
  store(static_cast<typename T::Stored*>(arguments.m.y) + static_cast<std::size_t>(token) * arguments.m.weight.rows + row,
        T::encode(sum + epilogue(arguments, token, row)));
}

// Blocks (x: rows of the decoded part, y: tokens).
// One barrier a stage: what is written now is the stage that all have left before the last one.
template <typename T>
RB_KERNEL(2) gemm_mma(MatmulKernel arguments) {
  const Matmul& m = arguments.m;
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  const int first_token = block_y() * MmaTile::kTokens, first_row = block_x() * MmaTile::kRows;
  // Eight warps, four by two, over 128 tokens and 64 rows.
  const int token = 32 * (warp >> 1), row = 32 * (warp & 1);
  auto* stages = reinterpret_cast<std::uint16_t*>(shared_memory());
  float sums[2][4][4] = {};
  MmaPieces pieces;
  pieces.read(arguments, first_token, first_row, 0);
  int current = 0;
  // The next pieces are on their way from memory while the present ones are multiplied.
  for (int k = 0; k < m.weight.columns; k += MmaTile::kDepth, current ^= 1) {
    // Two stages: a warp may still read the other one, never the one that is written here.
    pieces.write(stages + current * MmaTile::kStage);
    barrier();
    if (k + MmaTile::kDepth < m.weight.columns) pieces.read(arguments, first_token, first_row, k + MmaTile::kDepth);
    multiply_stage<T>(stages + current * MmaTile::kStage, token, row, sums);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int t = first_token + token + 16 * i + (lane >> 2) + 8 * (c / 2);
        const int n = first_row + row + 8 * j + 2 * (lane & 3) + c % 2;
        if (t >= m.tokens || n >= arguments.dense_rows) continue;
        store_product<T>(arguments, t, n, sums[i][j][c]);
      }
    }
  }
}

// fp32 tiles: 64 tokens x 64 rows x 16 inputs, 4 x 4 outputs a thread.
// 16 outputs a thread from 8 values: a load of shared memory feeds two multiply-adds a word. The padding of four words
// keeps float4 reads aligned and spreads the transposed writes over banks.
struct FloatTile {
  static constexpr int kSide = 64, kDepth = 16, kStride = kSide + 4;
  static constexpr std::size_t kBytes = 2 * kDepth * kStride * sizeof(float);
};

// Blocks (x: rows of the decoded part, y: tokens).
// x and W are transposed on the way, (depth, tokens) and (depth, rows), so that a thread's four tokens and four rows
// are one float4 each.
template <typename T>
RB_KERNEL(2) gemm_float(MatmulKernel arguments) {
  const Matmul& m = arguments.m;
  const int columns = m.weight.columns;
  const int first_token = block_y() * FloatTile::kSide, first_row = block_x() * FloatTile::kSide;
  const int token = 4 * (thread_index() / 16), row = 4 * (thread_index() % 16);
  const auto* x = static_cast<const float*>(m.x);
  const auto* dense = static_cast<const float*>(arguments.dense);
  auto* x_tile = reinterpret_cast<float*>(shared_memory());  // (depth, tokens)
  float* w_tile = x_tile + FloatTile::kDepth * FloatTile::kStride;
  float sums[4][4] = {};
  for (int k = 0; k < columns; k += FloatTile::kDepth) {
    for (int i = thread_index(); i < FloatTile::kSide * FloatTile::kDepth; i += kWarps * 32) {
      const int line = i / FloatTile::kDepth, depth = i % FloatTile::kDepth, column = k + depth;
      const int t = first_token + line, n = first_row + line;
      const std::size_t at = static_cast<std::size_t>(column);
      const bool inside = column < columns;
      x_tile[depth * FloatTile::kStride + line] =
          inside && t < m.tokens ? load(x + at + static_cast<std::size_t>(t) * columns) : 0.0f;
      w_tile[depth * FloatTile::kStride + line] =
          inside && n < arguments.dense_rows ? load_fresh(dense + at + static_cast<std::size_t>(n) * columns) : 0.0f;
    }
    barrier();
#pragma unroll
    for (int depth = 0; depth < FloatTile::kDepth; ++depth) {
      const float4 a = *reinterpret_cast<const float4*>(x_tile + depth * FloatTile::kStride + token);
      const float4 b = *reinterpret_cast<const float4*>(w_tile + depth * FloatTile::kStride + row);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    barrier();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = first_token + token + i, n = first_row + row + j;
      if (t >= m.tokens || n >= arguments.dense_rows) continue;
      store_product<T>(arguments, t, n, sums[i][j]);
    }
  }
}

}  // namespace rankbook::cuda
