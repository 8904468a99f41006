// The error branch and the bias, y += (x down^T) up^T + bias: `branch_down` leaves u = x down^T in the workspace before the
// product, whose kernels add u up^T where they write y.
//
// Two launches and not one, because every block of the product needs all of u, and blocks may not wait for each other. The
// factors are stored as int8 with a scale per rank; both scales are multiplied into u, once per rank and token, so that
// what is left for the product are plain codes of `up`. u is fp32: rounded to 16 bits it would cost more accuracy than the
// branch brings back at high ranks.
//
// Here is also what the kernels of a product share: their arguments, and how blocks that share a panel add up.
#pragma once

#include <climits>
#include <type_traits>

#include "kernels/cuda/codes.cuh"

namespace rankbook::cuda {

// A block of `branch_down` takes 4 ranks and 8 tokens: 32 sums, one for each lane at the end. x is then read R / 4 times,
// from the second-level cache but for the first; with a rank of 32 and one token there are 8 blocks, which read 16 KB each
// in about the time of one access to memory.
constexpr int kBranchRanks = 4, kBranchTokens = 8;
// The most blocks that share the columns, and the most tokens for which they do, see `branch_shares`.
constexpr int kMostUShares = 4, kMostUTokens = 64;

// Arguments of every kernel of a product. What they point to lies in the workspace.
struct MatmulKernel {
  Matmul m;
  float* u = nullptr;             // (u_shares, M, R)
  void* dense = nullptr;          // (dense_rows, K)
  float* shares = nullptr;        // sums of blocks that share outputs, see `reduce_and_store` and `store_share`
  unsigned* arrivals = nullptr;   // (panels) blocks that have left their sums; null where no panel is shared
  int first_row = 0;              // of the part of the weight that `dense` holds
  int dense_rows = 0;
  int u_shares = 1;               // blocks that share the columns of x down^T: the sum of what they left is u
};

// Where the tokens of a product are in x, y and u: all of them, in their order. `ListedTokens` (experts.cuh) are some.
struct AllTokens {
  int count;
  RB_DEVICE int at(int token) const { return token; }
};

// The first kernel of a product sets the counters to zero, where there is one before those that count: a memset would be
// one more node of the graph. Called by one block.
RB_DEVICE void clear_arrivals(unsigned* arrivals, int rows) {
  if (arrivals == nullptr) return;
  for (int i = thread_index(); i < (rows + kPanel - 1) / kPanel; i += kWarps * 32) store(arrivals + i, 0u);
}

// Four neighbouring elements of row `row` of a factor with `columns` columns, without its scale per rank.
RB_DEVICE void read_factor(const Factor& factor, int row, int column, int columns, float (&out)[4]) {
  const std::size_t at = static_cast<std::size_t>(row) * columns + column;
  std::uint32_t packed = 0;
  const bool word = factor.codes_full && (columns & 3) == 0;
  if (word && column < columns) packed = load(reinterpret_cast<const std::uint32_t*>(factor.codes + at));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = 0.0f;
    if (column + i >= columns) continue;
    out[i] = static_cast<float>(word ? static_cast<std::int8_t>(packed >> (8 * i))
                                     : load(factor.codes + (factor.codes_full ? at + i : 0)));
    if (factor.scale_full) out[i] *= read_float(factor.scale, at + i);
  }
}

// Eight neighbouring activations from column k on, zero past the end of the row. 16 bytes at a time where rows are made of
// whole pieces, which is the same for all threads.
template <typename T>
RB_DEVICE void read_activations(const typename T::Stored* row, int k, int columns, float (&out)[8]) {
  if ((columns & 7) != 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = k + i < columns ? T::decode(load(row + k + i)) : 0.0f;
  } else if constexpr (sizeof(typename T::Stored) == 4) {
    const float4 low = load(reinterpret_cast<const float4*>(row + k)), high = load(reinterpret_cast<const float4*>(row + k + 4));
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else {
    const uint4 v = load(reinterpret_cast<const uint4*>(row + k));
    const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = T::decode(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2))));
  }
}

// What one thread adds to x down^T for ranks `rank` .. + 3 and tokens `first` .. + 7, sums[8 rank + token]: the columns of
// its warp, one of `warps` that share them, eight to a lane.
template <typename T, typename Tokens>
RB_DEVICE void down_sums(const Matmul& m, const Tokens& tokens, int rank, int first, int warp, int warps, float (&sums)[32]) {
  const int columns = m.weight.columns;
  const auto* x = static_cast<const typename T::Stored*>(m.x);
  for (int k = 8 * (32 * warp + (thread_index() & 31)); k < columns; k += 8 * 32 * warps) {
    float down[kBranchRanks][2][4];
#pragma unroll
    for (int r = 0; r < kBranchRanks; ++r) {
      const int row = rank + r < m.rank ? rank + r : m.rank - 1;  // ranks that do not exist repeat the last one
      read_factor(m.down, row, k, columns, down[r][0]);
      read_factor(m.down, row, k + 4, columns, down[r][1]);
    }
#pragma unroll
    for (int t = 0; t < kBranchTokens; ++t) {
      if (first + t >= tokens.count) continue;
      float values[8];
      read_activations<T>(x + static_cast<std::size_t>(tokens.at(first + t)) * columns, k, columns, values);
#pragma unroll
      for (int r = 0; r < kBranchRanks; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[kBranchTokens * r + t] += values[i] * down[r][i / 4][i % 4];
      }
    }
  }
}

// The sum over the lanes of a warp of 32 values at once: lane i gets that of values[i], in values[0]. Each round halves
// what a lane holds, so that there are 31 shuffles; one value after the other would take 160, more than the products
// themselves. A template and not a loop, which the compiler does not unroll when its steps shrink.
template <int kHalf = 16>
RB_DEVICE float sum_of_lanes(float (&values)[32]) {
  const bool upper = (thread_index() & kHalf) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float give = upper ? values[i] : values[i + kHalf], keep = upper ? values[i + kHalf] : values[i];
    values[i] = keep + shuffle_xor(give, kHalf);
  }
  if constexpr (kHalf > 1) return sum_of_lanes<kHalf / 2>(values);
  return values[0];
}

// One element of u, with the scales per rank of both factors.
RB_DEVICE void store_u(const Matmul& m, int rank, int token, float sum, float* u) {
  if (rank >= m.rank || token >= m.tokens) return;
  const float scale = (m.down.scale_full ? 1.0f : read_float(m.down.scale, rank)) *
                      (m.up.scale_full ? 1.0f : read_float(m.up.scale, rank));
  store(u + static_cast<std::size_t>(token) * m.rank + rank, sum * scale);
}

// Where a block that has one of the shares of the columns leaves its part of u.
RB_DEVICE float* share_of_u(const MatmulKernel& arguments, int share) {
  return arguments.u + static_cast<std::size_t>(share) * arguments.m.tokens * arguments.m.rank;
}

// u of four ranks and up to eight tokens from `first` on; the warps share the columns, or a share of them. Shared memory: the
// sums of the warps.
template <typename T, typename Tokens>
RB_DEVICE void multiply_down(const MatmulKernel& arguments, const Tokens& tokens, int rank, int first, int share = 0) {
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  float sums[32] = {};
  down_sums<T>(arguments.m, tokens, rank, first, share * kWarps + warp, arguments.u_shares * kWarps, sums);
  auto* partial = reinterpret_cast<float*>(shared_memory());
  partial[32 * warp + lane] = sum_of_lanes<>(sums);
  barrier();
  wait_for_earlier();
  if (warp > 0) return;
  float sum = 0.0f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) sum += partial[32 * other + lane];
  const int token = first + lane % kBranchTokens;
  if (token >= tokens.count) return;
  store_u(arguments.m, rank + lane / kBranchTokens, tokens.at(token), sum, share_of_u(arguments, share));
}

// Blocks (x: 4 ranks, for each share of the columns; y: 8 tokens).
template <typename T>
RB_KERNEL(2) branch_down(MatmulKernel arguments) {
  let_next_start();
  if (block_x() == 0 && block_y() == 0) clear_arrivals(arguments.arrivals, arguments.m.weight.rows);
  const int shares = arguments.u_shares, rank = block_x() / shares * kBranchRanks;
  multiply_down<T>(arguments, AllTokens{arguments.m.tokens}, rank, block_y() * kBranchTokens, block_x() % shares);
}

// The same by tensor cores for many tokens, where `down` is stored as int8, whose codes are exact in fp16 and bfloat16.
// Blocks (x: 16 ranks, for each share of the columns; y: 8 kTiles tokens), whose warps share the columns. Ranks are the rows of
// operand A, tokens the columns of B; a lane takes 16 neighbouring columns of both, as in decode_mma.cuh. `branch_down` would
// read x R / 4 times: at 1,024 tokens longer than a fifth of the product takes. Shared memory: the sums of the warps.
constexpr int kBranchMmaRanks = 16;
constexpr std::size_t branch_mma_bytes(int tiles) { return sizeof(float) * kWarps * kBranchMmaRanks * 8 * tiles; }

// Four int8 codes as two pairs of 16-bit floats: a byte in the bits of a float is 2^15 + byte, as in PanelParams.
template <typename T>
RB_DEVICE void floats_of_codes(std::uint32_t codes, std::uint32_t& low, std::uint32_t& high) {
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = float_of(permute(codes ^ 0x80808080u, 0x47000000u, 0x7404u + 16u * static_cast<unsigned>(i))) - (32768.0f + 128.0f);
  }
  low = T::pack(values[0], values[1]), high = T::pack(values[2], values[3]);
}

template <typename T, int kTiles>
RB_KERNEL(5) branch_down_mma(MatmulKernel arguments) {
  constexpr int kColumns = 64;  // of a warp and step
  const Matmul& m = arguments.m;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, p = lane >> 2, q = lane & 3;
  const int shares = arguments.u_shares, share = block_x() % shares, columns = m.weight.columns;
  const int first_rank = block_x() / shares * kBranchMmaRanks, first_token = block_y() * 8 * kTiles;
  let_next_start();
  const std::int8_t* down[2];  // ranks and tokens that do not exist repeat the last ones: rows and columns do not mix
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int rank = first_rank + p + 8 * i;
    down[i] = m.down.codes + static_cast<std::size_t>(rank < m.rank ? rank : m.rank - 1) * columns;
  }
  const std::uint16_t* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = first_token + 8 * tile + p;
    x[tile] = static_cast<const std::uint16_t*>(m.x) + static_cast<std::size_t>(token < m.tokens ? token : m.tokens - 1) * columns;
  }
  float sums[kTiles][4] = {};
#pragma unroll(kTiles == 1 ? 4 : 1)
  for (int k = kColumns * (share * kWarps + warp) + 16 * q; k - 16 * q < columns; k += kColumns * kWarps * shares) {
    uint4 codes[2] = {{0u, 0u, 0u, 0u}, {0u, 0u, 0u, 0u}};
    if (k < columns) {  // rows are multiples of 16
#pragma unroll
      for (int i = 0; i < 2; ++i) codes[i] = load(reinterpret_cast<const uint4*>(down[i] + k));
    }
    const std::uint32_t words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                       {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
    std::uint32_t a[4][4];  // of four products
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) floats_of_codes<T>(words[i][j], a[j][i], a[j][2 + i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint4 pieces[2] = {{0u, 0u, 0u, 0u}, {0u, 0u, 0u, 0u}};
      if (k < columns) {
#pragma unroll
        for (int i = 0; i < 2; ++i) pieces[i] = load(reinterpret_cast<const uint4*>(x[tile] + k + 8 * i));
      }
      T::mma(sums[tile], a[0], pieces[0].x, pieces[0].y);
      T::mma(sums[tile], a[1], pieces[0].z, pieces[0].w);
      T::mma(sums[tile], a[2], pieces[1].x, pieces[1].y);
      T::mma(sums[tile], a[3], pieces[1].z, pieces[1].w);
    }
  }
  auto* partial = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = kBranchMmaRanks * 8 * kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      partial[kSums * warp + (8 * tile + 2 * q + c % 2) * kBranchMmaRanks + p + 8 * (c / 2)] = sums[tile][c];
    }
  }
  barrier();
  wait_for_earlier();
  for (int i = thread_index(); i < kSums; i += kWarps * 32) {
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) sum += partial[kSums * other + i];
    store_u(m, first_rank + i % kBranchMmaRanks, first_token + i / kBranchMmaRanks, sum, share_of_u(arguments, share));
  }
}

// Four neighbouring elements of u of a token, zero past the last rank; shares are added in their order.
RB_DEVICE void read_u(const MatmulKernel& arguments, int token, int rank, float (&out)[4]) {
  const int ranks = arguments.m.rank;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = 0.0f;
#pragma unroll
  for (int share = 0; share < kMostUShares; ++share) {  // unrolled, so that their loads are on the way together
    const bool exists = share < arguments.u_shares;
    const float* u = share_of_u(arguments, share) + static_cast<std::size_t>(token) * ranks + rank;
    if ((ranks & 3) == 0) {
      float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
      if (exists && rank < ranks) v = load_fresh(reinterpret_cast<const float4*>(u));
      out[0] += v.x, out[1] += v.y, out[2] += v.z, out[3] += v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] += exists && rank + i < ranks ? load_fresh(u + i) : 0.0f;
    }
  }
}

// Bias and error branch of one output.
RB_DEVICE float epilogue(const MatmulKernel& arguments, int token, int row) {
  const Matmul& m = arguments.m;
  float sum = load(m.bias + (m.bias_full ? row : 0));
  for (int r = 0; r < m.rank; r += 4) {
    float up[4], values[4];
    read_factor(m.up, row, r, m.rank, up);
    read_u(arguments, token, r, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += values[i] * up[i];
  }
  return sum;
}

// Output type chosen at run time, where the rest of a kernel does not depend on it.
// The kernels for rounded activations are the same for all types of x; only their last line differs.
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
// several blocks share a panel (y of the grid), each leaves its sums in the workspace, (blocks, panels, tokens, 32 rows),
// and the last one to arrive adds them up, always in the same order: atomic additions would need no counter, but give
// another last bit in every run. A tile is at most 2 KB, so that the last block's turn takes less than a launch would.
// kShared: whether blocks may share a panel at all, in kernels of one launch and no workspace (aot.cuh) they may not.
template <typename T, bool kShared = true, typename Tokens>
RB_DEVICE void reduce_and_store(const MatmulKernel& arguments, const Tokens& tokens, float* partial, int panel, int tile) {
  const Matmul& m = arguments.m;
  const int blocks = kShared ? grid_y() : 1, size = tile * kPanel;
  wait_for_earlier();  // up to here a product touches nothing but x, the weight and shared memory
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
    if (row >= m.weight.rows || token >= tokens.count) continue;
    const int at = tokens.at(token);
    float sum = epilogue(arguments, at, row);
    if (blocks > 1) {
      const float* share = arguments.shares + static_cast<std::size_t>(panel) * size + i;
      for (int block = 0; block < blocks; ++block) sum += load_other(share + static_cast<std::size_t>(block) * grid_x() * size);
    } else {
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * size + i];
    }
    store_output<T>(m, static_cast<std::size_t>(at) * m.weight.rows + row, sum);
  }
}

// The most blocks that share a panel of a product of few tokens; a bound that depends on the layer only, since engines are
// built, and their workspace is asked for, on other machines than those that run them. 768 blocks are more than fit at once.
inline int most_shares(int rows) {
  const int shares = 768 / ceil_div(rows, kPanel);
  return shares < 1 ? 1 : (shares < 8 ? shares : 8);
}

// How many blocks share a panel of few tokens, so that waves of `slots` blocks leave few places empty: the least time, counted
// in steps of a warp, of which a block's eight share `steps`; table and first codes take as long as about two. `taken` places
// of the first wave are those of a kernel that still runs.
inline int panel_shares(const Matmul& m, int steps, int slots, int taken) {
  const int panels = ceil_div(m.weight.rows, kPanel), of_warp = ceil_div(steps, kWarps);
  int best = 1;
  long least = LONG_MAX;
  for (int shares = 1; shares <= most_shares(m.weight.rows); ++shares) {
    const long cost = static_cast<long>(ceil_div(panels * shares + taken, slots)) * (2 + ceil_div(of_warp, shares));
    if (cost < least) best = shares, least = cost;
  }
  return best;
}

// Blocks of `branch_down` for each share of the columns.
inline dim3 branch_grid(const Matmul& m) { return dim3(ceil_div(m.rank, kBranchRanks), ceil_div(m.tokens, kBranchTokens)); }

// How many blocks share the columns of x down^T. A block reads what it multiplies at the rate of one multiprocessor: 4,096
// columns take 1.5 to 2.3 us on an H100. Who reads u adds the shares up, which pays while tokens are few; up to 16 tokens
// only where the product does not run beside it (`early`).
inline int branch_shares(const Matmul& m, bool early) {
  const bool few = m.tokens <= kMaxDecodeTokens;
  if (m.tokens > kMostUTokens || (few && early)) return 1;
  const int shares = m.weight.columns / (few ? 2 * kUShareColumns : kUShareColumns);
  return shares < 1 ? 1 : (shares < kMostUShares ? shares : kMostUShares);
}

}  // namespace rankbook::cuda
