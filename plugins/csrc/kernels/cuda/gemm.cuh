// The product for many tokens: the weight decoded once into a dense scratch (decode_dense), then a tiled product.
#pragma once

#include "kernels/cuda/branch.cuh"

namespace rankbook::cuda {

// Tensor-core tiles: 128 tokens x 64 rows x 32 inputs. Eight warps, 4 x 2, each 32 x 32 outputs.
struct MmaTile {
  static constexpr int kTokens = 128, kRows = 64, kDepth = 32;
  static constexpr int kStride = kDepth + 8;  // elements; 80 bytes put the eight fragment rows into distinct banks
  static constexpr int kStage = (kTokens + kRows) * kStride;  // elements
  static constexpr std::size_t kBytes = 2 * kStage * sizeof(std::uint16_t);
};

// Eight neighbouring elements of row `row`, zero outside the matrix.
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
struct MmaPieces {
  uint4 x[2], w;

  RB_DEVICE void read(const MatmulKernel& arguments, int first_token, int first_row, int k) {
    const Matmul& m = arguments.m;
    const int line = thread_index() / 4, column = k + 8 * (thread_index() % 4);
    const auto* from = static_cast<const std::uint16_t*>(m.x);
    x[0] = load_eight(from, first_token + line, m.tokens, column, m.weight.columns);
    x[1] = load_eight(from, first_token + 64 + line, m.tokens, column, m.weight.columns);
    w = load_eight(static_cast<const std::uint16_t*>(arguments.dense), first_row + line, m.weight.rows, column,
                   m.weight.columns);
  }

  RB_DEVICE void write(std::uint16_t* stage) const {
    std::uint16_t* at = stage + thread_index() / 4 * MmaTile::kStride + 8 * (thread_index() % 4);
    *reinterpret_cast<uint4*>(at) = x[0];
    *reinterpret_cast<uint4*>(at + 64 * MmaTile::kStride) = x[1];
    *reinterpret_cast<uint4*>(at + MmaTile::kTokens * MmaTile::kStride) = w;
  }
};

RB_DEVICE std::uint32_t shared_pair(const std::uint16_t* line, int row, int column) {
  return *reinterpret_cast<const std::uint32_t*>(line + row * MmaTile::kStride + column);
}

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

// Blocks (x: rows of W, y: tokens).
template <typename T>
RB_KERNEL(2) gemm_mma(MatmulKernel arguments) {
  const Matmul& m = arguments.m;
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  const int first_token = block_y() * MmaTile::kTokens, first_row = block_x() * MmaTile::kRows;
  const int token = 32 * (warp >> 1), row = 32 * (warp & 1);
  auto* stages = reinterpret_cast<std::uint16_t*>(shared_memory());
  float sums[2][4][4] = {};
  MmaPieces pieces;
  pieces.read(arguments, first_token, first_row, 0);
  int current = 0;
  for (int k = 0; k < m.weight.columns; k += MmaTile::kDepth, current ^= 1) {
    // Two stages: a warp may still read the other one, never the one that is written here.
    pieces.write(stages + current * MmaTile::kStage);
    barrier();
    if (k + MmaTile::kDepth < m.weight.columns) pieces.read(arguments, first_token, first_row, k + MmaTile::kDepth);
    multiply_stage<T>(stages + current * MmaTile::kStage, token, row, sums);
  }
  auto* y = static_cast<typename T::Stored*>(m.y);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int t = first_token + token + 16 * i + (lane >> 2) + 8 * (c / 2);
        const int n = first_row + row + 8 * j + 2 * (lane & 3) + c % 2;
        if (t >= m.tokens || n >= m.weight.rows) continue;
        store(y + static_cast<std::size_t>(t) * m.weight.rows + n, T::encode(sums[i][j][c] + epilogue(arguments, t, n)));
      }
    }
  }
}

// fp32 tiles: 64 tokens x 64 rows x 16 inputs, 4 x 4 outputs a thread.
struct FloatTile {
  static constexpr int kSide = 64, kDepth = 16, kStride = kSide + 4;
  static constexpr std::size_t kBytes = 2 * kDepth * kStride * sizeof(float);
};

// Blocks (x: rows of W, y: tokens).
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
          inside && n < m.weight.rows ? load_fresh(dense + at + static_cast<std::size_t>(n) * columns) : 0.0f;
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
  auto* y = static_cast<typename T::Stored*>(m.y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = first_token + token + i, n = first_row + row + j;
      if (t >= m.tokens || n >= m.weight.rows) continue;
      store(y + static_cast<std::size_t>(t) * m.weight.rows + n, T::encode(sums[i][j] + epilogue(arguments, t, n)));
    }
  }
}

}  // namespace rankbook::cuda
