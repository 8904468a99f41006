// The product for many tokens and 16-bit activations, with the weight decoded in registers on its way to the tensor cores.
//
// As in `decode_mma` weights are operand A and a warp owns a panel of 32 rows, but it multiplies what it decodes with 64
// tokens, and all columns of its panel. The eight warps of a block share the activations of a step, which arrive in shared
// memory by asynchronous copies, some steps ahead. A lane reads its chunk of a token 16 bytes at a time; rows are padded
// (and, with 3 bits, pieces swapped) so that the reads of a quarter of a warp meet different banks. The decoded weight never
// touches memory.
#pragma once

#include "kernels/cuda/decode_mma.cuh"

namespace rankbook::cuda {

template <typename T, int kBits, int kPlanes>
struct PrefillTile {
  using Lookup = typename LookupOf<T, kBits, kPlanes>::Type;
  static constexpr int kTiles = 8, kTokens = 8 * kTiles;
  static constexpr int kChunkBytes = 2 * Chunk<kBits>::kColumns, kStepBytes = 4 * kChunkBytes;
  static constexpr int kPitch = kStepBytes + (kBits == 3 ? 32 : 16);  // of a token
  static constexpr int kStages = kBits == 3 ? 2 : 3;
  static constexpr int kStageBytes = kTokens * kPitch;
  static constexpr std::size_t kBytes = Lookup::kBytes + static_cast<std::size_t>(kStages) * kStageBytes;

  // Byte offset of 16-byte piece i of chunk q in the row of a token.
  static RB_DEVICE unsigned piece(int q, int i) {
    return static_cast<unsigned>(kChunkBytes * q + 16 * (kBits == 3 ? i ^ (q >> 1) : i));
  }

  // Starts the copies of one step; zeros stand for what lies outside of x.
  static RB_DEVICE void copy(const Matmul& m, int first_token, int step, unsigned stage) {
    constexpr int kPieces = kStepBytes / 16, kOfChunk = kChunkBytes / 16;
#pragma unroll
    for (int i = 0; i < kTokens * kPieces / (kWarps * 32); ++i) {
      const int at = thread_index() + i * kWarps * 32, line = at / kPieces, c = at % kPieces;
      const int token = first_token + line, column = step * (kStepBytes / 2) + 8 * c;
      const bool inside = token < m.tokens && column < m.weight.columns;
      const auto* from = static_cast<const std::uint16_t*>(m.x);
      if (inside) from += static_cast<std::size_t>(token) * m.weight.columns + column;
      copy_async(stage + static_cast<unsigned>(line * kPitch) + piece(c / kOfChunk, c % kOfChunk), from, inside);
    }
  }
};

// Adds bias and error branch to the sums of a warp: rows `row` .. `row` + 3, tokens `token` + 8 tile, and the next ones.
template <int kTiles>
RB_DEVICE void add_epilogue(const MatmulKernel& arguments, int row, int token, float (&sums)[2][kTiles][4]) {
  const Matmul& m = arguments.m;
  for (int r = 0; r < m.rank; r += 4) {
    float up[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) read_factor(m.up, row + i < m.weight.rows ? row + i : m.weight.rows - 1, r, m.rank, up[i]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int at = token + 8 * tile + column;
        const float* u = arguments.u + static_cast<std::size_t>(at < m.tokens ? at : m.tokens - 1) * m.rank + r;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = r + k < m.rank ? load_fresh(u + k) : 0.0f;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i / 2][tile][2 * (i % 2) + column] += value * up[i][k];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float bias = load(m.bias + (m.bias_full ? (row + i < m.weight.rows ? row + i : 0) : 0));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) sums[i / 2][tile][2 * (i % 2) + column] += bias;
    }
  }
}

template <typename T, int kTiles>
RB_DEVICE void store_tiles(const Matmul& m, int row, int token, const float (&sums)[2][kTiles][4]) {
  const int rows = m.weight.rows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int at = token + 8 * tile + column;
      if (at >= m.tokens || row >= rows) continue;
      auto* y = static_cast<std::uint16_t*>(m.y) + static_cast<std::size_t>(at) * rows + row;
      if ((rows & 3) == 0) {
        uint2 packed;
        packed.x = T::pack(sums[0][tile][column], sums[0][tile][2 + column]);
        packed.y = T::pack(sums[1][tile][column], sums[1][tile][2 + column]);
        store(reinterpret_cast<uint2*>(y), packed);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (row + i < rows) store(y + i, T::encode(sums[i / 2][tile][2 * (i % 2) + column]));
        }
      }
    }
  }
}

// Blocks (x: eight panels, y: 64 tokens).
template <int kBits, int kPlanes, typename T>
RB_KERNEL(1) prefill_mma(MatmulKernel arguments) {
  using U = Unit<kBits>;
  using C = Chunk<kBits>;
  using Tile = PrefillTile<T, kBits, kPlanes>;
  constexpr int kTiles = Tile::kTiles, kRounds = C::kColumns / 16;  // four products, 16 columns of a chunk, to a round
  const Matmul& m = arguments.m;
  const PackedWeight& w = m.weight;
  const int lane = thread_index() & 31, p = lane >> 2, q = lane & 3;
  const int panels = (w.rows + kPanel - 1) / kPanel, wanted = block_x() * kWarps + (thread_index() >> 5);
  const int panel = wanted < panels ? wanted : panels - 1;  // a warp without a panel repeats the last one, and copies
  const int first_token = block_y() * Tile::kTokens, units = U::count(w.columns), chunks = units / U::kChunk;
  const unsigned stages = shared_address(shared_memory()) + static_cast<unsigned>(Tile::Lookup::kBytes);

  const Steps<kBits> steps(w);
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps.count) Tile::copy(m, first_token, step, stages + step * Tile::kStageBytes);
    commit_copies();
  }
  int chunk = q;
  const auto* codes = reinterpret_cast<const uint4*>(
      w.codes + (static_cast<std::size_t>(panel) * units + chunk * U::kChunk) * U::kWords * kPanel + 4 * p);
  C ahead = {};
  if (chunk < chunks) ahead.load_from(codes);
  PanelParams<kPlanes> params(w, panel, 4 * p);
  typename PanelParams<kPlanes>::Words words = {};
  const bool common = params.common(w);
  int group = steps.group(0, q);
  if (common) params.fetch(w, group, words);
  float scales[kPlanes];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) scales[plane] = plane_scale<kBits>(w, plane);
  params.prepare(w, panel, scales);
  typename Tile::Lookup lookup;
  lookup.prepare(w, scales, shared_memory());

  float sums[2][kTiles][4] = {};
  int step = 0, stage = 0, end = 0;
  while (step < steps.count) {
    lookup.set_group(common ? params.numbers(words) : params.numbers(w, panel, group, 4 * p));
    end = end + steps.span < steps.count ? end + steps.span : steps.count;
    group = steps.group(end, q);
    if (common) params.fetch(w, group, words);
    for (; step < end; ++step) {
      const C now = ahead;
      codes += 4 * C::kPitch;
      chunk += 4;
      if (chunk < chunks) ahead.load_from(codes);
      // The step is here for every warp, and no warp reads the one before it any more: its place takes a later one.
      wait_copies<Tile::kStages - 2>();
      barrier();
      const int free = stage == 0 ? Tile::kStages - 1 : stage - 1;
      if (step + Tile::kStages - 1 < steps.count) {
        Tile::copy(m, first_token, step + Tile::kStages - 1, stages + free * Tile::kStageBytes);
      }
      commit_copies();
      const unsigned at = stages + static_cast<unsigned>(stage * Tile::kStageBytes + p * Tile::kPitch);
      stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        std::uint32_t a[4][2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) lookup.fragment(now, i, kRounds * j + round, a[j][i]);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          std::uint32_t x[8];
          const unsigned line = at + static_cast<unsigned>(8 * tile * Tile::kPitch);
          read_shared(line + Tile::piece(q, 2 * round), x[0], x[1], x[2], x[3]);
          read_shared(line + Tile::piece(q, 2 * round + 1), x[4], x[5], x[6], x[7]);
          if constexpr (kBits == 2) lookup.arrange(x);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int product = kRounds * j + round;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              T::mma(sums[i][tile], a[j][i], x[lookup.first_word(product) - 8 * round], x[lookup.second_word(product) - 8 * round]);
            }
          }
        }
      }
    }
  }
  if (wanted >= panels) return;  // whole warps leave; no barrier follows
  const int row = panel * kPanel + 4 * p, token = first_token + 2 * q;
  add_epilogue(arguments, row, token, sums);
  store_tiles<T>(m, row, token, sums);
}

}  // namespace rankbook::cuda
