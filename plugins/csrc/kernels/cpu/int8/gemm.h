#pragma once

// Several tokens against one panel of 32 rows. A slice of the panel (some groups, or a part of a long one) is decoded to
// bytes in the L1 cache, plane by plane, and multiplied with all tokens: a tile of tokens and rows at a time, with its
// integer sums and its totals in registers.
//
// Decoding costs a look-up per four weights, once for all tokens; a slice is so small that what was decoded is still in the
// L1 cache when the last tile of tokens reads it. Planes are separate slices, since each has integer sums of its own.

#include <utility>

#include "kernels/cpu/int8/codes.h"
#if defined(__AMX_INT8__)
#include "kernels/cpu/int8/amx.h"
#endif

namespace rankbook {
namespace {
namespace int8_loops {

// Blocks of a slice, of one plane each; 8 lanes of 128 bytes a block. What is read again must stay in the first-level
// cache.
#if defined(__AMX_INT8__)
inline constexpr int kSliceBlocks = 8;   // 8 KB of entries, and as much for the sums of the tiles
#else
inline constexpr int kSliceBlocks = 16;  // 16 KB of entries; the rest of 32 KB is for the activations of a tile
#endif

// ---------------------------------------------------------------------------------------------- decoding

// Neighbouring blocks of one plane of one group.
// Entries lie as the dot products take them: (blocks, 8 lanes of four inputs, 32 rows, 4), a load a vector of rows.
struct Part {
  const uint8_t* entries;  // (blocks, 8, 32, 4)
  const int8_t* x;         // staged activations of token 0
  const int32_t* sums;     // (M) of the group
  const float* scales;     // (M) of the group
  const float* shifted;    // (M) of the group
  int64_t blocks;
  int32_t centre;
  bool first, last;        // of the group and plane
  bool shifts;             // the offset is added with this part
#if defined(__AMX_INT8__)
  const int32_t* products;  // (tokens of a unit, 32): integer sums of this part
  int64_t products_from;    // the first of these tokens
#endif
  alignas(64) float value[kPanel];
  alignas(64) float offset[kPanel];
};

// As many parts as fit, of one or several groups: with small groups a slice per group would start each tile too often.
// With groups of 64 a part has two blocks; eight of them share the loads and stores of a tile's totals.
struct Slice {
  Part parts[kSliceBlocks];
  int count = 0;
  int64_t blocks = 0;
  alignas(64) uint8_t entries[kSliceBlocks * 8 * kWordBytes];
};

// Codes are prefetched here as in the loop for few tokens: with a small chunk of tokens a panel still waits for memory.
template <int kBits, int... kIndex>
RANKBOOK_INLINE void decode_blocks(const uint8_t* from, const PlaneLevels<kBits>& levels, int64_t blocks, uint8_t* out,
                                   std::integer_sequence<int, kIndex...>) {
  for (int64_t block = 0; block < blocks; ++block, from += kBits * kWordBytes, out += 8 * kWordBytes) {
    RANKBOOK_UNROLL
    for (int64_t line = 0; line < kBits * kWordBytes; line += 64) prefetch_codes(from + line);
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kPanelVectors; ++vector) {
      const Block<kBits> words(from + vector * kLanes * 4);
      uint8_t* to = out + vector * kLanes * 4;
      (Bytes::store(to + kIndex * kWordBytes, levels.template entry<kIndex>(words.template index<kIndex>())), ...);
    }
  }
}

// Entries of blocks [block, block + blocks) of one plane, out (blocks, 8, 32, 4).
void decode(const Int8Weight& weight, int64_t panel, int plane, int64_t block, int64_t blocks, uint8_t* out) {
  constexpr auto kAll = std::make_integer_sequence<int, 8>{};
  const CodebookWeight& w = weight.weight;
  const uint8_t* from = codes_of(w, panel) + block * w.bits * kWordBytes;
  const PlaneTable& table = weight.tables[plane];
  switch (w.bits) {
    case 2:
      return decode_blocks(from, PlaneLevels<2>(table), blocks, out, kAll);
    case 3:
      return decode_blocks(from, PlaneLevels<3>(table), blocks, out, kAll);
    case 4:
      return decode_blocks(from, PlaneLevels<4>(table), blocks, out, kAll);
    default:
      return decode_blocks(from, PlaneLevels<8>(table), blocks, out, kAll);
  }
}

// Appends blocks [block, block + blocks) of a group and plane, which fit.
// Parameters are converted when the last part of a group is appended, once for all tokens of the chunk.
void append(const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t group, int plane, int64_t block,
            int64_t blocks, Slice& slice) {
  const CodebookWeight& w = weight.weight;
  const int64_t all = weight.group_blocks();
  Part& part = slice.parts[slice.count++];
  uint8_t* entries = slice.entries + slice.blocks * 8 * kWordBytes;
  slice.blocks += blocks;
  decode(weight, panel, plane, first_block(weight, group) + block, blocks, entries);
  part.entries = entries;
  part.x = x.codes + (group * x.tokens * all + block) * kBlock;
  part.sums = x.sums + group * x.tokens;
  part.scales = x.scales + group * x.tokens;
  part.shifted = x.shifts + group * x.tokens;
  part.blocks = blocks;
  part.centre = weight.tables[plane].centre;
  part.first = block == 0;
  part.last = block + blocks == all;
  part.shifts = w.has_offset && plane == w.planes - 1;
  if (part.last) values(weight, panel, group, plane, part.value);
  if (part.last && part.shifts) values(weight, panel, group, w.planes, part.offset);
}

// ---------------------------------------------------------------------------------------------- products

// Six tokens times two vectors are 12 integer sums and 12 totals of the 32 registers of AVX-512, four times two of each
// all 16 of AVX2 but for what the compiler keeps in memory; one or two tokens leave room for chains.
template <int kTokens>
struct TileSums {
  static constexpr int kVectors = 2;
  static constexpr int kChains = kTokens <= 2 ? Bytes::chains(2) : 1;  // several hide the latency of the dot product
  I sum[kTokens][kVectors][kChains];
  I total(int token, int vector) const {
    I out = sum[token][vector][0];
    RANKBOOK_UNROLL
    for (int chain = 1; chain < kChains; ++chain) out = Bytes::add(out, sum[token][vector][chain]);
    return out;
  }
};

#if defined(__AMX_INT8__)

// The integer sums of one part, which the tiles have computed.
template <int kTokens, bool>
inline void dot_part(const Part& part, int64_t, int64_t token, int row, TileSums<kTokens>& sums) {
  const int32_t* from = part.products + (token - part.products_from) * kPanel + row;
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RANKBOOK_UNROLL
    for (int v = 0; v < TileSums<kTokens>::kVectors; ++v) {
      I& sum = sums.sum[t][v][0];
      sum = Bytes::add(sum, Bytes::load(reinterpret_cast<const uint8_t*>(from + t * kPanel + v * kLanes)));
    }
  }
}

#else

// The integer sums of one part. A block at a time: a loop of a few turns is predicted better than one of many.
template <int kTokens, bool kSigned>
inline void dot_part(const Part& part, int64_t stride, int64_t token, int row, TileSums<kTokens>& sums) {
  const int8_t* x = part.x + token * stride;
  const uint8_t* w = part.entries + row * 4;
  constexpr int kVectors = TileSums<kTokens>::kVectors;
  constexpr int kChains = TileSums<kTokens>::kChains;
  for (int64_t block = 0; block < part.blocks; ++block, w += 8 * kWordBytes, x += kBlock) {
    RANKBOOK_UNROLL
    for (int lane = 0; lane < 8; ++lane) {
      I entries[kVectors];
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) entries[v] = Bytes::load(w + lane * kWordBytes + v * kLanes * 4);
      RANKBOOK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const I input = broadcast(x + t * stride + lane * 4);
        RANKBOOK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          I& sum = sums.sum[t][v][lane % kChains];
          sum = dot<kSigned>(sum, entries[v], input);
        }
      }
    }
  }
}

#endif

// Where the sums of a part begin: at the share of the centre, or where the part before left them.
// Levels are stored less a centre; what that takes from every weight is the centre times the sum of the activations, an
// integer, with which the sum begins.
template <int kTokens>
inline void begin_part(const Part& part, int64_t token, const int32_t* partial, TileSums<kTokens>& sums) {
  const int32_t* inputs = part.sums + token;
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const I start = Bytes::set(part.centre * inputs[t]);
    RANKBOOK_UNROLL
    for (int v = 0; v < TileSums<kTokens>::kVectors; ++v) {
      sums.sum[t][v][0] = start;
      RANKBOOK_UNROLL
      for (int chain = 1; chain < TileSums<kTokens>::kChains; ++chain) sums.sum[t][v][chain] = Bytes::set(0);
    }
  }
  if (part.first) return;
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RANKBOOK_UNROLL
    for (int v = 0; v < TileSums<kTokens>::kVectors; ++v) {
      sums.sum[t][v][0] = Bytes::load(reinterpret_cast<const uint8_t*>(partial + t * kPanel + v * kLanes));
    }
  }
}

// Adds what a group and plane gives, the offset too with the last plane.
// Order and roundings are those of the definition: (sum * scale), rounded, times value plus total, rounded once. A tile
// may therefore be cut anywhere but inside a group.
template <int kTokens, class Totals>
inline void end_group(const Part& part, int64_t token, int row, const TileSums<kTokens>& sums, Totals& total) {
  constexpr int kVectors = TileSums<kTokens>::kVectors;
  const float* scales = part.scales + token;
  F value[kVectors];
  RANKBOOK_UNROLL
  for (int v = 0; v < kVectors; ++v) value[v] = Simd::load(part.value + row + v * kLanes);
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const F scale = Simd::set(scales[t]);
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      total[t][v] = fused(multiply(Bytes::to_float(sums.total(t, v)), scale), value[v], total[t][v]);
    }
  }
  if (!part.shifts) return;
  const float* shifts = part.shifted + token;
  RANKBOOK_UNROLL
  for (int v = 0; v < kVectors; ++v) value[v] = Simd::load(part.offset + row + v * kLanes);
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const F shift = Simd::set(shifts[t]);
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) total[t][v] = fused(shift, value[v], total[t][v]);
  }
}

// A group longer than a slice leaves its integer sums in `partial`: exact, so that the cut does not show in the result.
template <int kTokens, bool kSigned>
void gemm_tile(const Slice& slice, int64_t stride, int64_t token, int row, int32_t* partial, float* out) {
  constexpr int kVectors = TileSums<kTokens>::kVectors;
  F total[kTokens][kVectors];
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) total[t][v] = Simd::load(out + t * kPanel + v * kLanes);
  }
  const Part* const end = slice.parts + slice.count;
  for (const Part* part = slice.parts; part < end; ++part) {
    TileSums<kTokens> sums;
    begin_part(*part, token, partial, sums);
    dot_part<kTokens, kSigned>(*part, stride, token, row, sums);
    if (part->last) {
      end_group(*part, token, row, sums, total);
      continue;
    }
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        Bytes::store(reinterpret_cast<uint8_t*>(partial + t * kPanel + v * kLanes), sums.total(t, v));
      }
    }
  }
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) Simd::store(out + t * kPanel + v * kLanes, total[t][v]);
  }
}

using Tile = void (*)(const Slice&, int64_t, int64_t, int, int32_t*, float*);

template <bool kSigned, int... kIndex>
Tile pick_tile(int64_t tokens, std::integer_sequence<int, kIndex...>) {
  static constexpr Tile kAll[] = {gemm_tile<kIndex + 1, kSigned>...};
  return kAll[tokens - 1];
}

// total (tokens, 32) += slice @ x, in tiles of nearly the same number of tokens: a tile of one loads as many
// entries as a tile of six.
// Thirteen tokens go as 4, 4 and 5 rather than 6, 6 and 1.
void multiply_tokens(const Slice& slice, bool is_signed, int64_t stride, int64_t first, int64_t tokens, int32_t* partial,
                     float* total) {
  constexpr auto kAll = std::make_integer_sequence<int, Bytes::kTokens>{};
  const int64_t tiles = ceil_div(tokens, Bytes::kTokens);
  int64_t token = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t count = (tokens - token) / (tiles - tile);
    Tile run = pick_tile<false>(count, kAll);
    if constexpr (Bytes::kSignedTables) {
      if (is_signed) run = pick_tile<true>(count, kAll);
    }
    for (int row = 0; row < kPanel; row += 2 * kLanes) {
      run(slice, stride, first + token, row, partial + token * kPanel + row, total + token * kPanel + row);
    }
    token += count;
  }
}

#if defined(__AMX_INT8__)

// The same, the integer sums of up to 16 tokens at a time in the tiles of AMX first.
class Multiplier {
 public:
  void operator()(Slice& slice, bool is_signed, int64_t stride, int64_t first, int64_t tokens, int32_t* partial, float* total) {
    const int64_t units = ceil_div(tokens, kUnitTokens);
    int64_t token = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t count = (tokens - token) / (units - unit);
      int32_t* out = products_;
      for (Part* part = slice.parts; part < slice.parts + slice.count; ++part, out += kUnitTokens * kPanel) {
        part->products = out;
        part->products_from = first + token;
        tiles_.multiply(part->x + part->products_from * stride, stride, count, part->entries, part->blocks, out);
      }
      multiply_tokens(slice, is_signed, stride, first + token, count, partial + token * kPanel, total + token * kPanel);
      token += count;
    }
  }

 private:
  TileUnit tiles_;
  alignas(64) int32_t products_[kSliceBlocks * kUnitTokens * kPanel];
};

#else

struct Multiplier {
  void operator()(const Slice& slice, bool is_signed, int64_t stride, int64_t first, int64_t tokens, int32_t* partial,
                  float* total) {
    multiply_tokens(slice, is_signed, stride, first, tokens, partial, total);
  }
};

#endif

// Groups are the outer loop and planes the inner one, so that fp32 additions happen in the order of the definition.
void gemm(const Int8Weight& weight, int64_t panel, const StagedRows& x, int64_t first, int64_t tokens, int32_t* partial,
          float* total) {
  const int64_t all = weight.group_blocks();
  Slice slice;
  Multiplier multiply_slice;
  const auto flush = [&] {
    multiply_slice(slice, weight.is_signed, all * kBlock, first, tokens, partial, total);
    slice.count = 0;
    slice.blocks = 0;
  };
  std::memset(total, 0, static_cast<size_t>(tokens * kPanel) * sizeof *total);
  for (int64_t group = 0; group < weight.weight.groups; ++group) {
    for (int plane = 0; plane < weight.weight.planes; ++plane) {
      for (int64_t block = 0; block < all; block += kSliceBlocks) {
        const int64_t count = all - block < kSliceBlocks ? all - block : kSliceBlocks;
        if (slice.blocks + count > kSliceBlocks) flush();
        append(weight, panel, x, group, plane, block, count, slice);
      }
    }
  }
  if (slice.count > 0) flush();
}

}  // namespace int8_loops
}  // namespace
}  // namespace rankbook
