#pragma once

// A few tokens in the tiles of AMX: a part of a panel is decoded to bytes in the L1 cache, multiplied by the tiles, and its
// sums are scaled, part after part.
//
// Neither a tile is loaded from bytes that were stored a moment ago without waiting for the stores, nor a vector from a
// tile. So three parts are under way: one is decoded while the one before it is multiplied and the one before that scaled.

#include "kernels/cpu/int8/gemm.h"

namespace rankbook {
namespace {
namespace int8_loops {

inline constexpr int64_t kTileTokens = 8;  // 16 totals, a half of the registers
inline constexpr int64_t kPartBlocks = 8;  // of a group and plane, 8 KB of entries, twice; longer groups go through gemm

// Groups in order and their planes in order, as the definition adds them.
struct PartIndex {
  int64_t group = 0;
  int plane = 0;
  void next(int planes) {
    if (++plane < planes) return;
    plane = 0;
    ++group;
  }
};

// Scales the sums of a part and adds them, then the offset of its group: the operations of end_group in gemm.h. `tokens`
// says which row of the sums each total is of.
// This and the decoder are part of the loop, or else every call would write the totals to memory.
template <class Totals>
RANKBOOK_INLINE void add_part(const Int8Weight& weight, int64_t panel, const PartIndex& part, const StagedRows& x,
                              int64_t first, const int64_t* tokens, const int32_t* sums, Totals& total) {
  const CodebookWeight& w = weight.weight;
  const int64_t at = part.group * x.tokens + first;
  const int32_t centre = weight.tables[part.plane].centre;
  F value[kPanelVectors];
  RANKBOOK_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) value[v] = value_of(weight, panel, part.group, part.plane, v * kLanes);
  RANKBOOK_UNROLL
  for (int64_t t = 0; t < kTileTokens; ++t) {
    const int64_t token = tokens[t];
    const I start = Bytes::set(centre * x.sums[at + token]);
    const F scale = Simd::set(x.scales[at + token]);
    RANKBOOK_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      const auto* from = reinterpret_cast<const uint8_t*>(sums + token * kPanel + v * kLanes);
      const F sum = Bytes::to_float(Bytes::add(start, Bytes::load(from)));
      total[t][v] = fused(multiply(sum, scale), value[v], total[t][v]);
    }
  }
  if (!w.has_offset || part.plane + 1 < w.planes) return;
  RANKBOOK_UNROLL
  for (int v = 0; v < kPanelVectors; ++v) value[v] = value_of(weight, panel, part.group, w.planes, v * kLanes);
  RANKBOOK_UNROLL
  for (int64_t t = 0; t < kTileTokens; ++t) {
    const F shift = Simd::set(x.shifts[at + tokens[t]]);
    RANKBOOK_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) total[t][v] = fused(shift, value[v], total[t][v]);
  }
}

template <int kBits>
void few_tokens(TileUnit& tiles, const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t first, int64_t tokens,
                float* y) {
  const int planes = weight.weight.planes;
  const int64_t blocks = weight.group_blocks();
  const int64_t size = blocks * 8 * kWordBytes;
  const int64_t parts = weight.weight.groups * planes;
  alignas(64) uint8_t entries[2 * kPartBlocks * 8 * kWordBytes];
  alignas(64) int32_t sums[2][kTileTokens * kPanel];
  int64_t which[kTileTokens];
  F total[kTileTokens][kPanelVectors];
  RANKBOOK_UNROLL
  for (int64_t t = 0; t < kTileTokens; ++t) {
    which[t] = t < tokens ? t : tokens - 1;
    RANKBOOK_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) total[t][v] = Simd::zero();
  }
  PartIndex decoded, multiplied, added;
  const auto decode_part = [&](int64_t part) {
    const uint8_t* from = codes_of(weight.weight, panel) + first_block(weight, decoded.group) * kBits * kWordBytes;
    const PlaneLevels<kBits> levels(weight.tables[decoded.plane]);
    decode_blocks(from, levels, blocks, entries + part % 2 * size, std::make_integer_sequence<int, 8>{});
    decoded.next(planes);
  };
  const auto multiply_part = [&](int64_t part) {
    const int8_t* from = x.codes + (multiplied.group * x.tokens + first) * blocks * kBlock;
    tiles.multiply(from, blocks * kBlock, tokens, entries + part % 2 * size, blocks, sums[part % 2]);
    multiplied.next(planes);
  };
  decode_part(0);
  if (parts > 1) decode_part(1);
  multiply_part(0);
  for (int64_t part = 0; part < parts; ++part) {
    if (part + 2 < parts) decode_part(part + 2);
    if (part + 1 < parts) multiply_part(part + 1);
    add_part(weight, panel, added, x, first, which, sums[part % 2], total);
    added.next(planes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int v = 0; v < kPanelVectors; ++v) Simd::store(y + t * kPanel + v * kLanes, total[t][v]);
  }
}

// y (tokens, 32) = w[panel] @ x[first ... first + tokens), for up to kTileTokens tokens and groups of up to kPartBlocks
// blocks.
void few_tokens(TileUnit& tiles, const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t first, int64_t tokens,
                float* y) {
  switch (weight.weight.bits) {
    case 2:
      return few_tokens<2>(tiles, weight, panel, x, first, tokens, y);
    case 3:
      return few_tokens<3>(tiles, weight, panel, x, first, tokens, y);
    case 4:
      return few_tokens<4>(tiles, weight, panel, x, first, tokens, y);
    default:
      return few_tokens<8>(tiles, weight, panel, x, first, tokens, y);
  }
}

}  // namespace int8_loops
}  // namespace
}  // namespace rankbook
