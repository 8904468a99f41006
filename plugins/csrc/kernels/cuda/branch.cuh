// The error branch and the bias: u = x down^T before the product, u up^T + bias at its end.
#pragma once

#include <type_traits>

#include "kernels/cuda/codes.cuh"

namespace rankbook::cuda {

constexpr int kBranchTokens = 8;  // tokens that one warp multiplies with one row of `down`

// Arguments of every kernel of a product. What they point to lies in the workspace.
struct MatmulKernel {
  Matmul m;
  float* u = nullptr;             // (M, R)
  void* dense = nullptr;          // (N, K)
  float* shares = nullptr;        // (blocks per panel, panels, tokens of a kernel, 32 rows) sums
  unsigned* arrivals = nullptr;   // (panels), zero at the start
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

// u[m][r] = sum_k x[m][k] down[r][k], times the scales per rank of both factors, for one rank and the `kBranchTokens` tokens
// from `first` on. The work of one warp.
template <typename T>
RB_DEVICE void down_row(const Matmul& m, int rank, int first, float* u) {
  const int lane = thread_index() & 31, columns = m.weight.columns;
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
      store(u + static_cast<std::size_t>(first + t) * m.rank + rank, sums[t] * scale);
    }
  }
}

// A warp per rank and `kBranchTokens`.
template <typename T>
RB_KERNEL(1) branch_down(MatmulKernel arguments) {
  const int rank = block_x() * kWarps + (thread_index() >> 5);
  if (rank >= arguments.m.rank) return;  // whole warps leave; no barrier follows
  down_row<T>(arguments.m, rank, block_y() * kBranchTokens, arguments.u);
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

// Output type chosen at run time, where the rest of a kernel does not depend on it.
struct AnyType {};

template <typename T>
RB_DEVICE void store_output(const Matmul& m, std::size_t at, float value) {
  if constexpr (!std::is_same_v<T, AnyType>) {
    store(static_cast<typename T::Stored*>(m.y) + at, T::encode(value));
  } else if (m.type == DataType::kFloat32) {
    store(static_cast<float*>(m.y) + at, value);
  } else {
    store(static_cast<std::uint16_t*>(m.y) + at, m.type == DataType::kFloat16 ? Half::encode(value) : BFloat::encode(value));
  }
}

// Adds up what the warps of a block left in `partial` (kWarps, tokens, 32 rows) and writes the outputs of one panel. Where
// several blocks share a panel, each leaves its sums in the workspace and the last one to arrive adds them up, always in
// the same order.
template <typename T>
RB_DEVICE void reduce_and_store(const MatmulKernel& arguments, float* partial, int panel, int tile) {
  const Matmul& m = arguments.m;
  const int blocks = arguments.shares == nullptr ? 1 : grid_y(), size = tile * kPanel;
  if (blocks > 1) {
    for (int i = thread_index(); i < size; i += kWarps * 32) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * size + i];
      publish(arguments.shares + (static_cast<std::size_t>(block_y()) * grid_x() + panel) * size + i, sum);
    }
    barrier();
    if (thread_index() == 0) partial[0] = arrive(arguments.arrivals + panel) + 1u == unsigned(blocks) ? 1.0f : 0.0f;
    barrier();
    if (partial[0] == 0.0f) return;
    see_others();
  }
  for (int i = thread_index(); i < size; i += kWarps * 32) {
    const int row = panel * kPanel + i % kPanel, token = i / kPanel;
    if (row >= m.weight.rows || token >= m.tokens) continue;
    float sum = epilogue(arguments, token, row);
    if (blocks > 1) {
      const float* share = arguments.shares + static_cast<std::size_t>(panel) * size + i;
      for (int block = 0; block < blocks; ++block) sum += load_other(share + static_cast<std::size_t>(block) * grid_x() * size);
    } else {
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * size + i];
    }
    store_output<T>(m, static_cast<std::size_t>(token) * m.weight.rows + row, sum);
  }
}

}  // namespace rankbook::cuda
