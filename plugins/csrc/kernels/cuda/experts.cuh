// Products of experts: every token has a number, and is multiplied by the layer of a stack that it says.
//
// Few tokens: one launch. A block takes a panel for a token and finds the other tokens of the same expert itself; the
// first of eight takes all of them, the blocks of the others leave. Only the codes of chosen experts are read, once for
// eight tokens. More than eight tokens an expert, on average: `sort_tokens` orders them and cuts tiles of 64, and the
// tiled product runs over those (as in MegaBlocks, Gale et al. 2022). The loops are those of the other products, which
// take the constants of one layer (`of_expert`) and a list of tokens.
//
// Blocks never share the columns of a panel here: there are as many times more blocks as there are chosen experts.
#pragma once

#include "kernels/cuda/decode_float.cuh"
#include "kernels/cuda/decode_mma.cuh"
#include "kernels/cuda/prefill_mma.cuh"

namespace rankbook::cuda {

constexpr int kExpertTokens = 8;              // of a block, with few tokens
constexpr int kTileTokens = 64;               // of a tile
constexpr int kFewTokens = kWarps * 32;       // a number for each thread of a block
constexpr int kMostExperts = 4096;
constexpr int kMostExpertTokens = kMostBlocksY / 2 / kTileTokens * kTileTokens;  // of one launch: the rest is for tiles

// Tokens of one expert, by their places in `order`.
struct TokenTile {
  int expert;
  int first;
  int count;  // 0: nothing to do
};

// Arguments of every kernel here.
struct ExpertKernel {
  MatmulKernel k;
  int* order = nullptr;        // (M) tokens, those of one expert beside each other
  TokenTile* tiles = nullptr;  // null: few tokens, which blocks find themselves
};

// Tiles that there is room for. Expert e has those from `first_tile` on, so that no block needs the counts of others: from
// one expert to the next there are at least as many places as tiles.
inline int expert_tiles(int tokens, int experts) { return tokens / kTileTokens + experts; }
RB_DEVICE int first_tile(int tokens_before, int expert) { return tokens_before / kTileTokens + expert; }

// Some of the tokens. The list is in shared memory, read by its own addresses: through a pointer that two ways have set,
// the compiler would read from any memory.
struct ListedTokens {
  unsigned list;
  int count;
  RB_DEVICE int at(int token) const {
    std::uint32_t place;
    read_shared(list + 4 * static_cast<unsigned>(token), place);
    return static_cast<int>(place);
  }
};

struct ExpertTokens {
  int expert;  // -1: one that does not exist
  ListedTokens tokens;
};

// Shared memory behind that of a product: the list, and a sum for each warp.
constexpr std::size_t list_bytes(int tokens) { return sizeof(int) * static_cast<std::size_t>(tokens + kWarps); }

RB_DEVICE bool exists(const Matmul& m, std::int64_t number) { return number >= 0 && number < m.experts; }

RB_DEVICE Factor of_expert(const Factor& stack, std::size_t expert, std::size_t size, std::size_t ranks) {
  Factor out = stack;
  out.codes += expert * (stack.codes_full ? size : 1);
  const std::size_t scales = expert * (stack.scale_full ? size : ranks) * (stack.scale.type == DataType::kFloat32 ? 4 : 2);
  out.scale.data = static_cast<const char*>(stack.scale.data) + scales;
  return out;
}

// The product with the constants of one expert.
RB_DEVICE Matmul of_expert(const Matmul& stack, int number) {
  Matmul m = stack;
  PackedWeight& w = m.weight;
  const std::size_t expert = static_cast<std::size_t>(number), rows = static_cast<std::size_t>(w.rows);
  const std::size_t panels = (rows + kPanel - 1) / kPanel, blocks = static_cast<std::size_t>((w.columns + kBlock - 1) / kBlock);
  const std::size_t planes = panels * w.params_planes, full = planes * w.groups * kPanel;
  w.codes += expert * panels * blocks * w.bits * kPanel;
  w.levels += expert * (static_cast<std::size_t>(w.params_planes) << w.bits);
  w.params += expert * (w.params_full ? full : 1);
  const std::size_t steps = expert * (w.step_full ? full : planes) * (w.step.type == DataType::kFloat32 ? 4 : 2);
  w.step.data = static_cast<const char*>(w.step.data) + steps;
  w.base += expert * (w.base_full ? planes : 1);
  m.bias += expert * (m.bias_full ? rows : 1);
  if (m.rank > 0) {
    const std::size_t ranks = static_cast<std::size_t>(m.rank);
    m.down = of_expert(m.down, expert, ranks * w.columns, ranks);
    m.up = of_expert(m.up, expert, rows * ranks, ranks);
  }
  return m;
}

// The sum of `value` over the threads before this one and, in `total`, over all of a block. `sums` is shared memory, a
// number for each warp, free again after the next barrier.
RB_DEVICE unsigned sum_before(unsigned value, unsigned* sums, unsigned& total) {
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  unsigned before = 0, all = value;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const unsigned other = shuffle_xor(all, mask);
    if ((lane & mask) != 0) before += other;
    all += other;
  }
  if (lane == 0) sums[warp] = all;
  barrier();
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return before;
}

// The tokens of the expert of token `own`, which is one of up to kFewTokens, from itself on; none where another block has
// them. `list` is shared memory of list_bytes(kExpertTokens).
RB_DEVICE ExpertTokens find_tokens(const Matmul& m, int own, int* list) {
  const std::int64_t number = load(m.numbers + own);
  const int token = thread_index();
  const bool same = token < m.tokens && load(m.numbers + token) == number;
  // Two sums at once: tokens of the expert below, those of them before `own` above.
  unsigned total;
  const unsigned before =
      sum_before((same ? 1u : 0u) + (same && token < own ? 0x10000u : 0u), reinterpret_cast<unsigned*>(list + kExpertTokens), total);
  const int all = static_cast<int>(total & 0xffffu), first = static_cast<int>(total >> 16), left = all - first;
  const int place = static_cast<int>(before & 0xffffu) - first;
  if (same && place >= 0 && place < kExpertTokens) list[place] = token;
  barrier();
  const int count = first % kExpertTokens != 0 ? 0 : (left < kExpertTokens ? left : kExpertTokens);
  return {exists(m, number) ? static_cast<int>(number) : -1, {shared_address(list), count}};
}

// Tokens of a tile from its place `from` on, at most `most`. `list` is shared memory of as many.
RB_DEVICE ExpertTokens tile_tokens(const ExpertKernel& k, int index, int from, int most, int* list) {
  const TokenTile* tile = k.tiles + index;
  const int left = load_fresh(&tile->count) - from, count = left < 0 ? 0 : (left < most ? left : most);
  if (thread_index() < count) list[thread_index()] = load_fresh(k.order + load_fresh(&tile->first) + from + thread_index());
  barrier();
  return {load_fresh(&tile->expert), {shared_address(list), count}};
}

// Up to eight tokens of y of the grid, in either way.
RB_DEVICE ExpertTokens eight_tokens(const ExpertKernel& k, int* list) {
  if (k.tiles == nullptr) return find_tokens(k.k.m, block_y(), list);
  constexpr int kParts = kTileTokens / kExpertTokens;
  return tile_tokens(k, block_y() / kParts, block_y() % kParts * kExpertTokens, kExpertTokens, list);
}

RB_DEVICE void store_nan(const Matmul& m, std::size_t at) {
  if (m.type == DataType::kFloat32) store(static_cast<float*>(m.y) + at, float_of(0x7fc00000u));
  else store(static_cast<std::uint16_t*>(m.y) + at, static_cast<std::uint16_t>(0x7fff));  // one in fp16 and in bf16
}

// One panel of tokens whose expert does not exist.
RB_DEVICE void store_nan(const Matmul& m, const ListedTokens& tokens, int panel) {
  for (int i = thread_index(); i < tokens.count * kPanel; i += kWarps * 32) {
    const int row = panel * kPanel + i % kPanel;
    if (row < m.weight.rows) store_nan(m, static_cast<std::size_t>(tokens.at(i / kPanel)) * m.weight.rows + row);
  }
}

// Orders tokens by expert and cuts tiles. Blocks (x: expert, and behind all of them one for tokens of none, which come out as
// NaN); a thread goes through neighbouring tokens twice. Every block reads all numbers: 128 KB for 2,048 tokens with eight
// experts each, from the second-level cache; no block waits for another, and the order is that of the tokens.
template <typename Unused = void>
RB_KERNEL(1) sort_tokens(ExpertKernel k) {
  const Matmul& m = k.k.m;
  const int expert = block_x(), each = (m.tokens + kWarps * 32 - 1) / (kWarps * 32), from = thread_index() * each;
  const int to = from + each < m.tokens ? from + each : m.tokens;
  const auto key = [&](int token) {
    const std::int64_t number = load(m.numbers + token);
    return exists(m, number) ? static_cast<int>(number) : m.experts;
  };
  unsigned lower = 0, same = 0;
  for (int token = from; token < to; ++token) {
    const int other = key(token);
    lower += other < expert ? 1u : 0u;
    same += other == expert ? 1u : 0u;
  }
  unsigned total;  // both sums at once, of less than 2^16 tokens
  const unsigned before = sum_before(same + (lower << 16), reinterpret_cast<unsigned*>(shared_memory()), total);
  const int start = static_cast<int>(total >> 16), count = static_cast<int>(total & 0xffffu);
  int place = start + static_cast<int>(before & 0xffffu);
  for (int token = from; token < to; ++token) {
    if (key(token) != expert) continue;
    store(k.order + place++, token);
    for (int row = 0; expert == m.experts && row < m.weight.rows; ++row) {
      store_nan(m, static_cast<std::size_t>(token) * m.weight.rows + row);
    }
  }
  const int first = first_tile(start, expert), all = m.tokens / kTileTokens + m.experts;
  const int next = expert == m.experts ? all : first_tile(start + count, expert + 1);
  for (int i = first + thread_index(); i < next; i += kWarps * 32) {
    const int done = (i - first) * kTileTokens, left = expert == m.experts ? 0 : count - done;
    store(&k.tiles[i].expert, expert);
    store(&k.tiles[i].first, start + done);
    store(&k.tiles[i].count, left < 0 ? 0 : (left < kTileTokens ? left : kTileTokens));
  }
}

// u of the error branches of experts. Blocks (x: four ranks, y: tokens as `eight_tokens` takes them).
template <typename T>
RB_KERNEL(2) experts_down(ExpertKernel k) {
  const ExpertTokens found = eight_tokens(k, reinterpret_cast<int*>(shared_memory() + sizeof(float) * 32 * kWarps));
  if (found.tokens.count == 0 || found.expert < 0) return;
  MatmulKernel own = k.k;
  own.m = of_expert(k.k.m, found.expert);
  multiply_down<T>(own, found.tokens, block_x() * kBranchRanks, 0);
}

// y of few tokens. Blocks (x: panel, y: token). Shared memory: that of `decode_mma` for eight tokens, then the list.
template <int kBits, int kPlanes, typename T>
RB_KERNEL(2) experts_mma(ExpertKernel k) {
  auto* list = reinterpret_cast<int*>(shared_memory() + DecodeShared<kBits, kPlanes, T>::bytes(1));
  const ExpertTokens found = find_tokens(k.k.m, block_y(), list);
  if (found.tokens.count == 0) return;
  if (found.expert < 0) return store_nan(k.k.m, found.tokens, block_x());
  MatmulKernel own = k.k;
  own.m = of_expert(k.k.m, found.expert);
  multiply_panel_mma<kBits, kPlanes, 1, T, false>(own, found.tokens);
}

// y of many tokens. Blocks (x: eight panels, y: tile). Shared memory: that of `prefill_mma`, then the list.
template <int kBits, int kPlanes, typename T>
RB_KERNEL(1) experts_tile_mma(ExpertKernel k) {
  using Tile = PrefillTile<T, kBits, kPlanes>;
  static_assert(Tile::kTokens == kTileTokens);
  const ExpertTokens found = tile_tokens(k, block_y(), 0, kTileTokens, reinterpret_cast<int*>(shared_memory() + Tile::kBytes));
  if (found.tokens.count == 0) return;
  MatmulKernel own = k.k;
  own.m = of_expert(k.k.m, found.expert);
  const int steps = Steps<kBits>(own.m.weight).count;
  multiply_tiles_mma<kBits, kPlanes, T>(own, found.tokens, {grid_x(), steps, steps});
}

template <int kBits>
constexpr std::size_t experts_float_bytes() {
  constexpr std::size_t table = FloatDecoder<kBits, kMaxPlanes>::kTableBytes, sums = sizeof(float) * kWarps * kExpertTokens * kPanel;
  return table > sums ? table : sums;
}

// y of any number of tokens, planes and any type, in fp32: the parity form, and what tensor cores do not take. Blocks (x:
// panel, y: tokens as `eight_tokens` takes them).
template <int kBits>
RB_KERNEL(1) experts_float(ExpertKernel k) {
  const ExpertTokens found = eight_tokens(k, reinterpret_cast<int*>(shared_memory() + experts_float_bytes<kBits>()));
  if (found.tokens.count == 0) return;
  if (found.expert < 0) return store_nan(k.k.m, found.tokens, block_x());
  MatmulKernel own = k.k;
  own.m = of_expert(k.k.m, found.expert);
  multiply_panel_float<kBits, kMaxPlanes, kExpertTokens, AnyType, false>(own, found.tokens);
}

}  // namespace rankbook::cuda
