// The product for many tokens and 16-bit activations, with the weight decoded in registers on its way to the tensor cores.
//
// As in `decode_mma` weights are operand A and a warp owns a panel of 32 rows, but it multiplies what it decodes with 64
// tokens, and all columns of its panel. The eight warps of a block share the activations of a step, which arrive in shared
// memory by asynchronous copies, some steps ahead. A lane reads its chunk of a token 16 bytes at a time; rows are padded
// (and, with 3 bits, pieces swapped) so that the reads of a quarter of a warp meet different banks. The decoded weight never
// touches memory.
//
// Who calls it: Width<>::prefill_16 for more than 16 tokens of fp16 or bf16 with one or two planes, rounded activations
// among them once they are floats again. Tiles of 256 rows and 64 tokens; a block's eight warps decode eight panels
// side by side and share x.
//
// Where tiles would leave multiprocessors idle, all of them or in a last wave, the steps of all tiles, one after another,
// are cut evenly (Osama et al. 2023, "Stream-K"): a block may end one tile and begin the next, and `add_shares` adds up what
// blocks have of tiles that several work on. By arithmetic a layer of 4,096 x 4,096 at 17 tokens takes 30 us on an H100 with
// 16 blocks and 5 with 128 of them (tools/dev/layer_time.py). Blocks that share a tile share the ranks of the error branch too.
#pragma once

#include "kernels/cuda/decode_mma.cuh"

namespace rankbook::cuda {

// Three stages of 64 tokens times 64 columns (9 KB each with padding), two of 128 columns with 3 bits, beside a table
// of 32 KB: at most 60 KB, which every GPU since Turing grants when asked.
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
  // With 3 bits a chunk is 64 bytes, so that lanes q and q + 2 of a token would read the same banks: their pieces are
  // swapped.
  static RB_DEVICE unsigned piece(int q, int i) {
    return static_cast<unsigned>(kChunkBytes * q + 16 * (kBits == 3 ? i ^ (q >> 1) : i));
  }

  // Starts the copies of one step; zeros stand for what lies outside of x.
  // 256 threads copy 16 bytes each, two to four times a step. cp.async bypasses registers and, with .cg, the
  // first-level cache, which these bytes would only pass through.
  template <typename Tokens>
  static RB_DEVICE void copy(const Matmul& m, const Tokens& tokens, int first_token, int step, unsigned stage) {
    constexpr int kPieces = kStepBytes / 16, kOfChunk = kChunkBytes / 16;
#pragma unroll
    for (int i = 0; i < kTokens * kPieces / (kWarps * 32); ++i) {
      const int at = thread_index() + i * kWarps * 32, line = at / kPieces, c = at % kPieces;
      const int token = first_token + line, column = step * (kStepBytes / 2) + 8 * c;
      const bool inside = token < tokens.count && column < m.weight.columns;
      const auto* from = static_cast<const std::uint16_t*>(m.x);
      if (inside) from += static_cast<std::size_t>(tokens.at(token)) * m.weight.columns + column;
      copy_async(stage + static_cast<unsigned>(line * kPitch) + piece(c / kOfChunk, c % kOfChunk), from, inside);
    }
  }
};

// The second half of the error branch takes sixteen ranks at a time, and brings u for up to four of these turns at once.
constexpr int kTurnRanks = 16, kTurns = 4;

// Which turns a block has of a tile: blocks that share it have one after the other.
struct BranchTurns {
  int share, shares;

  constexpr int first() const { return kTurnRanks * share; }
  constexpr int pitch() const { return kTurnRanks * shares; }
};

// Brings u of the tokens of a tile for the turns from rank `first` on to shared memory, (turns, tokens, 16), where the stages of x
// were. Read by every warp for itself it would come eight times, and take registers that the loop has not left.
template <int kTokens, typename Tokens>
RB_DEVICE void bring_u(const MatmulKernel& arguments, const Tokens& tokens, int first_token, int first, int pitch, float4* staged) {
  static_assert(kTokens * kTurnRanks / 4 == kWarps * 32, "four ranks of a token for each thread");
  const int at = first_token + thread_index() / 4, token = tokens.at(at < tokens.count ? at : tokens.count - 1);
  barrier();  // no warp reads what is there any more
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    float u[4];
    read_u(arguments, token, first + turn * pitch + 4 * (thread_index() % 4), u);
    staged[turn * kWarps * 32 + thread_index()] = float4{u[0], u[1], u[2], u[3]};
  }
  barrier();
}

// Adds u up^T for sixteen ranks to the sums of a warp in plain fp32: 1,024 multiply-adds a lane, at R = 128 as much work as the product.
template <int kTiles>
RB_DEVICE void add_turn_plain(const Matmul& m, int row, int first, const float4* staged, float (&sums)[2][kTiles][4]) {
  for (int piece = 0; piece < kTurnRanks / 4 && first + 4 * piece < m.rank; ++piece) {
    float up[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read_factor(m.up, row + i < m.weight.rows ? row + i : m.weight.rows - 1, first + 4 * piece, m.rank, up[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float4 u = staged[4 * (8 * tile + 2 * (thread_index() & 3) + column) + piece];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i / 2][tile][2 * (i % 2) + column] += u.x * up[i][0] + u.y * up[i][1] + u.z * up[i][2] + u.w * up[i][3];
        }
      }
    }
  }
}

// The same on tensor cores where `up` is stored as int8, whose codes are exact in bfloat16. u goes in three terms of 8 bits
// of mantissa each, which together are the fp32 number: 3 R / 16 products a tile where the main loop has K / 16, 2 % at a
// rank of 32 and 4,096 inputs. Fragments as in the main loop: lane q holds ranks 4 q .. 4 q + 3 of sixteen.
template <int kTiles>
RB_DEVICE void add_turn(const Matmul& m, int row, int first, const float4* staged, float (&sums)[2][kTiles][4]) {
  const int lane = thread_index() & 31;
  std::uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float up[4];
    read_factor(m.up, row + i < m.weight.rows ? row + i : m.weight.rows - 1, first + 4 * (lane & 3), m.rank, up);
    a[i / 2][i % 2] = pack_bfloat(up[0], up[1]);
    a[i / 2][2 + i % 2] = pack_bfloat(up[2], up[3]);
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float4 u = staged[32 * tile + lane];  // of token 8 tile + lane / 4
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      const std::uint32_t b0 = pack_bfloat(u.x, u.y), b1 = pack_bfloat(u.z, u.w);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma_bfloat(sums[i][tile], a[i], b0, b1);
      u.x -= float_of(b0 << 16), u.y -= float_of(b0 & 0xffff0000u);
      u.z -= float_of(b1 << 16), u.w -= float_of(b1 & 0xffff0000u);
    }
  }
}

// Adds the block's turns of u up^T to the sums of a tile.
template <int kTiles, typename Tokens>
RB_DEVICE void add_branch(const MatmulKernel& arguments, const Tokens& tokens, int row, int first_token, const BranchTurns& turns,
                          float4* staged, float (&sums)[2][kTiles][4]) {
  const Matmul& m = arguments.m;
#pragma unroll 1
  for (int first = turns.first(); first < m.rank; first += kTurns * turns.pitch()) {
    bring_u<8 * kTiles>(arguments, tokens, first_token, first, turns.pitch(), staged);
#pragma unroll 1
    for (int turn = 0; turn < kTurns && first + turn * turns.pitch() < m.rank; ++turn) {
      const int rank = first + turn * turns.pitch();
      const float4* of_turn = staged + turn * kWarps * 32;
      if (kHasBFloatMma && m.up.codes_full) add_turn(m, row, rank, of_turn, sums);
      else add_turn_plain(m, row, rank, of_turn, sums);
    }
  }
}

template <int kTiles>
RB_DEVICE void add_bias(const Matmul& m, int row, float (&sums)[2][kTiles][4]) {
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

// How the steps of all tiles are cut: block b takes `own` of them from b `own` on. Tiles are counted along the rows first.
struct Split {
  int across = 0;  // tiles side by side
  int steps = 0;   // of a tile, with those beyond its columns that make it a multiple of `own` where no block shall have two tiles
  int own = 0;     // of a block

  constexpr bool whole() const { return own == steps; }  // a block is a tile; there may be more steps than 32 bits count
  constexpr int first_block(int tile) const { return whole() ? tile : static_cast<int>(unsigned(tile) * steps / own); }
  constexpr int blocks_of(int tile) const {
    return whole() ? 1 : static_cast<int>((unsigned(tile + 1) * steps - 1) / own) - first_block(tile) + 1;
  }
};

// Arguments of `prefill_mma` and `add_shares`.
struct PrefillKernel {
  MatmulKernel k;
  Split split;
};

template <typename T, int kTiles, typename Tokens>
RB_DEVICE void store_tiles(const Matmul& m, const Tokens& tokens, int row, int token, const float (&sums)[2][kTiles][4]) {
  const int rows = m.weight.rows;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int at = token + 8 * tile + column;
      if (at >= tokens.count || row >= rows) continue;
      auto* y = static_cast<std::uint16_t*>(m.y) + static_cast<std::size_t>(tokens.at(at)) * rows + row;
      // Four rows of a token are 8 bytes of y; rows that are no multiple of four are not aligned to them.
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

// Blocks that share the columns of a tile leave their sums here, (shares, M, rows of all panels): four rows of a token are
// 16 bytes of a lane, and eight lanes fill a cache line.
template <int kTiles>
RB_DEVICE void store_share(const MatmulKernel& arguments, int share, int row, int token, const float (&sums)[2][kTiles][4]) {
  const Matmul& m = arguments.m;
  const int rows = (m.weight.rows + kPanel - 1) / kPanel * kPanel;
  float* to = arguments.shares + static_cast<std::size_t>(share) * m.tokens * rows + row;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int at = token + 8 * tile + column;
      if (at >= m.tokens || row >= rows) continue;
      store(reinterpret_cast<float4*>(to + static_cast<std::size_t>(at) * rows),
            float4{sums[0][tile][column], sums[0][tile][2 + column], sums[1][tile][column], sums[1][tile][2 + column]});
    }
  }
}

// Adds up what `prefill_mma` left in `shares`. A kernel of its own, over all multiprocessors: the last block of a tile to
// arrive would read 64 KB for each share alone, for longer than the product took. Nothing but sums: bias and branch are in the
// shares, for here every token would read `up` again. Blocks (x: 128 rows, y: 8 tokens), all of one tile; a lane takes four
// rows of a token.
template <typename T>
RB_KERNEL(2) add_shares(PrefillKernel arguments) {
  const Matmul& m = arguments.k.m;
  const int row = 4 * (32 * block_x() + (thread_index() & 31)), token = block_y() * kWarps + (thread_index() >> 5);
  const int shares = arguments.split.blocks_of(block_y() * kWarps / 64 * arguments.split.across + block_x() / 2);
  wait_for_earlier();
  if (shares == 1 || row >= m.weight.rows || token >= m.tokens) return;  // no barrier follows
  const std::size_t rows = static_cast<std::size_t>((m.weight.rows + kPanel - 1) / kPanel) * kPanel;
  float sums[4] = {};
  // In the order of the shares, whoever wrote them first: results repeat bit for bit.
  for (int share = 0; share < shares; ++share) {
    const std::size_t at = (static_cast<std::size_t>(share) * m.tokens + token) * rows + row;
    const float4 v = load_fresh(reinterpret_cast<const float4*>(arguments.k.shares + at));
    sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
  }
  auto* y = static_cast<std::uint16_t*>(m.y) + static_cast<std::size_t>(token) * m.weight.rows + row;
  if ((m.weight.rows & 3) == 0) {
    uint2 packed;
    packed.x = T::pack(sums[0], sums[1]), packed.y = T::pack(sums[2], sums[3]);
    store(reinterpret_cast<uint2*>(y), packed);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < m.weight.rows) store(y + i, T::encode(sums[i]));
    }
  }
}

// A block's part of y of some tokens, in tiles of eight panels and 64 tokens.
// Rows come first: blocks that run at the same time share a tile of tokens, which all but the first find in the
// second-level cache, while each reads codes of its own.
template <int kBits, int kPlanes, typename T, typename Tokens>
RB_DEVICE void multiply_tiles_mma(const MatmulKernel& arguments, const Tokens& tokens, const Split& split) {
  using C = Chunk<kBits>;
  using Tile = PrefillTile<T, kBits, kPlanes>;
  constexpr int kTiles = Tile::kTiles, kRounds = C::kColumns / 16;  // four products, 16 columns of a chunk, to a round
  const Matmul& m = arguments.m;
  const PackedWeight& w = m.weight;
  const int lane = thread_index() & 31, p = lane >> 2, q = lane & 3, panels = (w.rows + kPanel - 1) / kPanel;
  const unsigned stages = shared_address(shared_memory()) + static_cast<unsigned>(Tile::Lookup::kBytes);

  const Steps<kBits> steps(w);
  float scales[kPlanes];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) scales[plane] = plane_scale<kBits>(w, plane);
  typename Tile::Lookup lookup;
  const int tiles = split.across * ((tokens.count + Tile::kTokens - 1) / Tile::kTokens);
  int tile = split.whole() ? block_x() : static_cast<int>(unsigned(block_x()) * split.own / split.steps);
  int step = split.whole() ? 0 : static_cast<int>(unsigned(block_x()) * split.own % split.steps);
  // Each turn is a tile, or what is the block's of one.
  for (int left = split.own; left > 0 && tile < tiles; ++tile, step = 0) {
    const int begin = step, to = step + left < split.steps ? step + left : split.steps;
    const int last = to < steps.count ? to : steps.count;
    const int wanted = tile % split.across * kWarps + (thread_index() >> 5), first_token = tile / split.across * Tile::kTokens;
    const int panel = wanted < panels ? wanted : panels - 1;  // a warp without a panel repeats the last one, and copies
    const int live = tokens.count - first_token;
    const bool first = left == split.own;
    left -= to - begin;
    if (!first) barrier();  // no warp reads the stages of the tile before any more
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (step + i < last) Tile::copy(m, tokens, first_token, step + i, stages + i * Tile::kStageBytes);
      commit_copies();
    }
    PanelReader<kBits, kPlanes> reader(w, steps, panel, step, last);
    reader.params.prepare(w, panel, scales);
    if (first) lookup.prepare(w, scales, shared_memory());

    float sums[2][kTiles][4] = {};
    // A share may begin inside a group: `end` is then that of the group it is in.
    int stage = 0, end = step / steps.span * steps.span;
    while (step < last) {
      lookup.set_group(reader.numbers(w));
      end = end + steps.span < last ? end + steps.span : last;
      reader.fetch_group(w, steps.group(end, q));
      for (; step < end; ++step) {
        const C now = reader.next_codes(step + 1 < last);
        // The step is here for every warp, and no warp reads the one before it any more: its place takes a later one.
        // One barrier a step: it stands before the copies that overwrite the stage read last.
        wait_copies<Tile::kStages - 2>();
        barrier();
        // The stage that was read last.
        const int free = stage == 0 ? Tile::kStages - 1 : stage - 1;
        if (step + Tile::kStages - 1 < last) {
          Tile::copy(m, tokens, first_token, step + Tile::kStages - 1, stages + free * Tile::kStageBytes);
        }
        commit_copies();
        const unsigned at = stages + static_cast<unsigned>(stage * Tile::kStageBytes + p * Tile::kPitch);
        stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
// A round decodes a quarter of what a lane holds of a step, for fragments of one round to fit registers.
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
          // Weights of 16 columns of a chunk are decoded once and meet eight tiles of tokens: 32 registers of operands
          // beside 64 of sums.
          std::uint32_t a[4][2][4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) lookup.fragment(now, i, kRounds * j + round, a[j][i]);
          }
#pragma unroll
          for (int part = 0; part < kTiles; ++part) {
            // Products of tokens that do not exist are left out, sixteen tokens at a time: 17 tokens cost half of 64.
            // The branch is the same for all warps of a block, so that it costs nothing but itself; rounding to sixteen
            // keeps 16 products between two branches.
            if (part % 2 == 0 && part > 0 && 8 * part >= live) break;
            std::uint32_t x[8];
            const unsigned line = at + static_cast<unsigned>(8 * part * Tile::kPitch);
            read_shared(line + Tile::piece(q, 2 * round), x[0], x[1], x[2], x[3]);
            read_shared(line + Tile::piece(q, 2 * round + 1), x[4], x[5], x[6], x[7]);
            if constexpr (kBits == 2) lookup.arrange(x);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int product = kRounds * j + round;
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                T::mma(sums[i][part], a[j][i], x[lookup.first_word(product) - 8 * round], x[lookup.second_word(product) - 8 * round]);
              }
            }
          }
        }
      }
    }
    wait_for_earlier();
    const int row = wanted * kPanel + 4 * p, token = first_token + 2 * q;
    const int share = block_x() - split.first_block(tile), shares = split.blocks_of(tile);
    auto* staged = reinterpret_cast<float4*>(shared_memory() + Tile::Lookup::kBytes);
    add_branch(arguments, tokens, row, first_token, {share, shares}, staged, sums);
    if (share == 0) add_bias(m, row, sums);
    if (shares > 1) store_share(arguments, share, row, token, sums);
    else store_tiles<T>(m, tokens, row, token, sums);
  }
}

// Blocks take steps as `Split` says. With 3 bits it would spill what it holds if it left room for x down^T.
template <int kBits, int kPlanes, typename T>
RB_KERNEL_REGISTERS(kBits == 3 ? 255 : kRegistersBeside) prefill_mma(PrefillKernel arguments) {
  let_next_start();
  multiply_tiles_mma<kBits, kPlanes, T>(arguments.k, AllTokens{arguments.k.m.tokens}, arguments.split);
}

}  // namespace rankbook::cuda
