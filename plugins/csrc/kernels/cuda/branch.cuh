// The error branch and the bias: u = x down^T before the product, u up^T + bias at its end.
#pragma once

#include "kernels/cuda/codes.cuh"

namespace rankbook::cuda {

constexpr int kBranchTokens = 8;  // tokens that one warp multiplies with one row of `down`

// Arguments of every kernel of a product: `u` (M, R) and `dense` (N, K) lie in the workspace.
struct MatmulKernel {
  Matmul m;
  float* u = nullptr;
  void* dense = nullptr;
};

// Four neighbouring elements of row `row` of a factor with `columns` columns, without its scale per rank.
RB_DEVICE void read_factor(const Factor& factor, int row, int column, int columns, float (&out)[4]) {
  const std::size_t at = static_cast<std::size_t>(row) * columns + column;
  std::uint32_t packed = 0;
  const bool word = factor.codes_full && (columns & 3) == 0;
  if (word) packed = load(reinterpret_cast<const std::uint32_t*>(factor.codes + at));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = 0.0f;
    if (column + i >= columns) continue;
    out[i] = static_cast<float>(word ? static_cast<std::int8_t>(packed >> (8 * i))
                                     : load(factor.codes + (factor.codes_full ? at + i : 0)));
    if (factor.scale_full) out[i] *= read_float(factor.scale, at + i);
  }
}

// u[m][r] = sum_k x[m][k] down[r][k], times the scales per rank of both factors. A warp per rank and `kBranchTokens`.
template <typename T>
RB_KERNEL(1) branch_down(MatmulKernel arguments) {
  const Matmul& m = arguments.m;
  const int lane = thread_index() & 31;
  const int rank = block_x() * kWarps + (thread_index() >> 5);
  const int first = block_y() * kBranchTokens;
  const int columns = m.weight.columns;
  if (rank >= m.rank) return;  // whole warps leave; no barrier follows
  const auto* x = static_cast<const typename T::Stored*>(m.x);
  float sums[kBranchTokens] = {};
  for (int k = 4 * lane; k < columns; k += 4 * 32) {
    float down[4];
    read_factor(m.down, rank, k, columns, down);
#pragma unroll
    for (int t = 0; t < kBranchTokens; ++t) {
      if (first + t >= m.tokens) continue;
      const auto* row = x + static_cast<std::size_t>(first + t) * columns;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i < columns) sums[t] += T::decode(load(row + k + i)) * down[i];
      }
    }
  }
  const float scale = (m.down.scale_full ? 1.0f : read_float(m.down.scale, rank)) *
                      (m.up.scale_full ? 1.0f : read_float(m.up.scale, rank));
#pragma unroll
  for (int t = 0; t < kBranchTokens; ++t) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) sums[t] += shuffle_xor(sums[t], mask);
    if (lane == 0 && first + t < m.tokens) {
      store(arguments.u + static_cast<std::size_t>(first + t) * m.rank + rank, sums[t] * scale);
    }
  }
}

// Bias and error branch of one output.
RB_DEVICE float epilogue(const MatmulKernel& arguments, int token, int row) {
  const Matmul& m = arguments.m;
  float sum = load(m.bias + (m.bias_full ? row : 0));
  const float* u = arguments.u + static_cast<std::size_t>(token) * m.rank;
  for (int r = 0; r < m.rank; r += 4) {
    float up[4];
    read_factor(m.up, row, r, m.rank, up);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (r + i < m.rank) sum += load_fresh(u + r + i) * up[i];
    }
  }
  return sum;
}

// Adds up what the warps of a block left in `partial` (kWarps, tokens, 32 rows) and writes the outputs of one panel.
template <typename T>
RB_DEVICE void reduce_and_store(const MatmulKernel& arguments, const float* partial, int panel, int tile, int first) {
  const Matmul& m = arguments.m;
  for (int i = thread_index(); i < tile * kPanel; i += kWarps * 32) {
    const int row = panel * kPanel + i % kPanel;
    const int token = first + i / kPanel;
    if (row >= m.weight.rows || token >= m.tokens) continue;
    float sum = epilogue(arguments, token, row);
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * tile * kPanel + i];
    store(static_cast<typename T::Stored*>(m.y) + static_cast<std::size_t>(token) * m.weight.rows + row,
          T::encode(sum));
  }
}

}  // namespace rankbook::cuda
