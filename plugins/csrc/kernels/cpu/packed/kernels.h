#pragma once

// The inner loops for one panel of 32 rows, included once per instruction set (sets/*.cpp). A vector holds the
// same input of neighbouring rows, so accumulators are vertical and every vector multiplies the same broadcast input.
//
// Reading order: code extraction, row of levels, parameters, one token (gemv), decoding, many tokens (gemm), dispatch.
//
// A weight is never put together here for one token: sum_k w x over a group is sum_p value[p] * sum_k levels[p][code] x, so the
// parameters are met once per group and plane, and the offset once per group, times the sum of x. That leaves a shift, a
// look-up and a multiply-add per weight and plane; at one plane the loop waits for memory, at two for those instructions
// (0.44 ns of a vector of 16 weights at 4 bits on an AMD Zen 5, of 0.57 measured).

#include <utility>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/prefetch.h"
#include "kernels/cpu/simd/simd.h"

namespace rankbook {
namespace {
namespace packed_loops {

using F = Simd::F;
using I = Simd::I;

// Two vectors of rows share every broadcast of an input, which costs a load; with four, two planes of sums with their
// chains no longer fit 16 registers of AVX2.
inline constexpr int kVectors = 2;                          // vectors of rows that a loop carries at a time
inline constexpr int kTile = kVectors * Simd::kLanes;       // rows of them: 32, 16 or 8 of the panel
inline constexpr int kMaxPlanes = Simd::kPlanes;            // planes per pass; more take further passes over the codes

// ---------------------------------------------------------------------------------------------- code extraction

// The words of one half block (16 inputs) for one vector of rows; see plugins/layout.py for the bit order. Half a block,
// because groups are multiples of 16: whole blocks would need a second path for those that end in the middle of one.
// Words are read where the file has them and never repacked: the top bit of each byte is flipped on the way into the
// register (load_words), an exclusive or for 4 to 16 codes a lane.
template <int kBits, int kHalf>
struct HalfBlock {
  static constexpr int kWords = kBits == 3 ? 3 : kBits / 2;
  I words[kWords];

  explicit HalfBlock(const uint8_t* block) {
    RANKBOOK_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = Simd::load_words(block + (kBits == 3 ? i : kHalf * kWords + i) * kWordBytes);
  }

  // Lanes whose low bits are the code of input kHalf * 16 + kIndex.
  // Bits above the code stay: lookup() ignores them, which saves a mask per code. With 3 bits the codes are laid out so
  // that six of eight need one shift, and the other two a shift each of two words and a merge.
  template <int kIndex>
  I code() const {
    if constexpr (kBits != 3) {
      constexpr int kPerWord = 32 / kBits;
      return Simd::shift<kIndex % kPerWord * kBits>(words[kIndex / kPerWord]);
    } else {
      constexpr int kByte = (kHalf * 2 + kIndex / 8) * 8;
      constexpr int kCode = kIndex % 8;
      if constexpr (kCode < 6) {
        return Simd::shift<kByte + kCode % 2 * 3>(words[kCode / 2]);
      } else {
        // Two bits at the top of A (or B), the third at bit 6 (or 7) of C.
        return Simd::merge<3>(Simd::shift<kByte + 6>(words[kCode % 2]), Simd::shift<kByte + kCode - 2>(words[2]));
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------- row of levels

// What turns codes into levels. A table of up to 16 levels is one or two registers and one permutation.
// vpermps looks 8 levels up in a clock with AVX2, 16 with AVX-512; the 16 levels of 4 bits are two permutations and a
// blend on AVX2, which is the third instruction that rank 2 pays for.
template <int kBits>
struct Levels {
  static constexpr int kCodeBits = kBits;
  Simd::Table<kBits> table;
  Levels(const CodebookWeight& weight, int plane) : table(weight.levels + plane * kLevels<kBits>) {}
  F operator()(I codes) const { return table.lookup(codes); }
};

// 256 levels fit no register and a gather takes 16 loads; those of affine formats lie on a line, which takes none.
template <>
struct Levels<kBits8Linear> {
  static constexpr int kCodeBits = 8;
  F first, slope;
  Levels(const CodebookWeight& weight, int plane)
      : first(Simd::set(weight.slopes[plane * 2])), slope(Simd::set(weight.slopes[plane * 2 + 1])) {}
  F operator()(I codes) const { return Simd::line(codes, first, slope); }
};

// Rows of levels [begin, begin + kPlanes), kept in registers over the loop.
// More planes than kMaxPlanes take another pass over the codes: registers would spill in every step of the loop,
// another pass costs the codes once more.
template <int kBits, int kPlanes, int... kIndex>
struct LevelRows {
  Levels<kBits> row[kPlanes];
  LevelRows(const CodebookWeight& weight, int begin, std::integer_sequence<int, kIndex...>)
      : row{Levels<kBits>(weight, begin + kIndex)...} {}
};

// A function, since the indices of a sequence cannot be deduced from a constructor.
template <int kPlanes, int kBits, int... kIndex>
LevelRows<kBits, kPlanes, kIndex...> level_rows(const CodebookWeight& weight, int begin,
                                                std::integer_sequence<int, kIndex...> planes) {
  return LevelRows<kBits, kPlanes, kIndex...>(weight, begin, planes);
}

// ---------------------------------------------------------------------------------------------- parameters

// Parameters of rows [row, row + lanes) of a panel for one group and plane.
// The layout (NP, G, Q, 32) puts the 32 rows of one plane and group beside each other: a vector of parameters is one
// load, and with int8 a cache line holds two planes.
inline F param(const CodebookWeight& weight, int64_t panel, int64_t group, int64_t plane, int row) {
  const int64_t planes = weight.param_planes();
  const int64_t at = ((panel * weight.groups + group) * planes + plane) * kPanel + row;
  if (weight.form == ParamForm::kInt8) {
    const int64_t scale = panel * planes + plane;
    const F stored = Simd::from_int8(static_cast<const int8_t*>(weight.params) + at);
    return Simd::fma(stored, Simd::set(weight.step[scale]), Simd::set(weight.base[scale]));
  }
  return weight.form == ParamForm::kFloat16 ? Simd::from_half(static_cast<const uint16_t*>(weight.params) + at)
                                            : Simd::load(static_cast<const float*>(weight.params) + at);
}

inline const uint8_t* panel_codes(const CodebookWeight& weight, int64_t panel) {
  return weight.codes + panel * weight.blocks() * weight.bits * kWordBytes;
}

// Rounded up, because one group per row may have any number of inputs; all others are multiples of a half block.
inline int64_t half_blocks_per_group(const CodebookWeight& weight) {
  return ceil_div(weight.in_features / weight.groups, kHalfBlock);
}

// ---------------------------------------------------------------------------------------------- one token

// Sums over the inputs of a group, one per plane, vector and chain. Several chains hide the latency of the addition.
// An FMA has a latency of four clocks and two of them start in each: eight independent sums keep both units busy, which
// are 2 vectors times 4 chains at one plane, times 2 planes times 2 chains at two.
template <int kPlanes>
struct GroupSums {
  static constexpr int kChains = kPlanes == 1 ? 4 : kPlanes == 2 ? 2 : 1;
  F sum[kPlanes][kVectors][kChains];

  GroupSums() {
    RANKBOOK_UNROLL
    for (auto& plane : sum) {
      RANKBOOK_UNROLL
      for (auto& vector : plane) {
        RANKBOOK_UNROLL
        for (F& chain : vector) chain = Simd::zero();
      }
    }
  }
  F total(int plane, int vector) const {
    F out = sum[plane][vector][0];
    RANKBOOK_UNROLL
    for (int chain = 1; chain < kChains; ++chain) out = Simd::add(out, sum[plane][vector][chain]);
    return out;
  }
};

// 16 inputs of each row of the tile. Inputs are the outer loop, so that a code is extracted once for all planes; the chain
// of a sum changes with the input, because a multiply-add waits four cycles for the one before it.
// The index is a template parameter, not a loop variable: the shift is then an immediate, and the chain a register
// name.
template <int kBits, int kHalf, int kPlanes, class Rows, int... kIndex>
inline void dot_half_block(const uint8_t* block, const float* x, const Rows& rows, GroupSums<kPlanes>& sums,
                           std::integer_sequence<int, kIndex...>) {
  constexpr int kChains = GroupSums<kPlanes>::kChains;
  RANKBOOK_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) {
    const HalfBlock<kBits, kHalf> codes(block + vector * Simd::kLanes * 4);
    const auto one = [&](auto index) {
      constexpr int kInput = decltype(index)::value;
      const I code = codes.template code<kInput>();
      const F input = Simd::set(x[kInput]);
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        F& sum = sums.sum[plane][vector][kInput % kChains];
        sum = Simd::fma(rows.row[plane](code), input, sum);
      }
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
  }
}

// y (tile) += the planes [begin, begin + kPlanes) of the panel's rows [row, row + kTile), and the offset if asked.
// One call is a tile of one panel over all inputs, so that the rows of levels are loaded once. The prefetch reaches
// beyond the panel: the next one follows in memory, and after the last one the next product (Product::copy).
template <int kBits, int kPlanes>
void gemv_tile(const CodebookWeight& weight, int64_t panel, int row, int begin, bool offset, const float* x,
               const float* group_sums, float* y) {
  constexpr int kCodeBits = Levels<kBits>::kCodeBits;
  constexpr auto kInputs = std::make_integer_sequence<int, kHalfBlock>{};
  const auto rows = level_rows<kPlanes, kBits>(weight, begin, std::make_integer_sequence<int, kPlanes>{});
  const uint8_t* codes = panel_codes(weight, panel) + row * 4;
  const int64_t halves = half_blocks_per_group(weight);
  // y is read and written once, whatever the number of groups: totals are what the next plane's pass begins with.
  F total[kVectors];
  RANKBOOK_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) total[vector] = Simd::load(y + vector * Simd::kLanes);
  int64_t half = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    GroupSums<kPlanes> sums;
    const int64_t begin_half = half;
    half += halves;
    for (int64_t at = begin_half / 2; at * 2 < half; ++at) {  // a group may begin or end inside a block
      const uint8_t* block = codes + at * kCodeBits * kWordBytes;
      const float* inputs = x + at * kBlock;
      for (int line = 0; line < kCodeBits * kTile * 4 / 64; ++line) prefetch_codes(block + line * 64);
      if (at * 2 >= begin_half) dot_half_block<kCodeBits, 0>(block, inputs, rows, sums, kInputs);
      if (at * 2 + 1 < half) dot_half_block<kCodeBits, 1>(block, inputs + kHalfBlock, rows, sums, kInputs);
    }
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) {
      const int at = row + vector * Simd::kLanes;
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        total[vector] = Simd::fma(param(weight, panel, group, begin + plane, at), sums.total(plane, vector), total[vector]);
      }
      if (offset) {
        const F share = param(weight, panel, group, weight.planes, at);
        total[vector] = Simd::fma(share, Simd::set(group_sums[group]), total[vector]);
      }
    }
  }
  RANKBOOK_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) Simd::store(y + vector * Simd::kLanes, total[vector]);
}

// ---------------------------------------------------------------------------------------------- decoding

template <int kBits, int kHalf, int kPlanes, class Rows, int... kIndex>
inline void decode_half_block(const uint8_t* block, const Rows& rows, const F (*params)[kVectors], const F* offsets,
                              bool first, float* out, std::integer_sequence<int, kIndex...>) {
  RANKBOOK_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) {
    const HalfBlock<kBits, kHalf> codes(block + vector * Simd::kLanes * 4);
    const auto one = [&](auto index) {
      constexpr int kInput = decltype(index)::value;
      const I code = codes.template code<kInput>();
      float* to = out + kInput * kPanel + vector * Simd::kLanes;
      F weight = first ? offsets[vector] : Simd::load(to);
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) weight = Simd::fma(params[plane][vector], rows.row[plane](code), weight);
      Simd::store(to, weight);
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
  }
}

// out (k1 - k0, 32): the planes [begin, begin + kPlanes) of rows [row, row + kTile), added to out unless `first`.
// Here a weight is put together, since many tokens will use it: P multiply-adds once for a slice that 192 tokens read
// from the L1 cache. The parameters of a group stay in registers until the group changes.
template <int kBits, int kPlanes>
void decode_tile(const CodebookWeight& weight, int64_t panel, int row, int begin, bool first, int64_t k0, int64_t k1,
                 float* out) {
  constexpr int kCodeBits = Levels<kBits>::kCodeBits;
  constexpr auto kInputs = std::make_integer_sequence<int, kHalfBlock>{};
  const auto rows = level_rows<kPlanes, kBits>(weight, begin, std::make_integer_sequence<int, kPlanes>{});
  const uint8_t* codes = panel_codes(weight, panel) + row * 4;
  const int64_t halves = half_blocks_per_group(weight);
  F params[kPlanes][kVectors];
  F offsets[kVectors];
  int64_t loaded = -1;
  for (int64_t half = k0 / kHalfBlock; half < k1 / kHalfBlock; ++half) {
    const int64_t group = half / halves;
    if (group != loaded) {
      loaded = group;
      RANKBOOK_UNROLL
      for (int vector = 0; vector < kVectors; ++vector) {
        const int at = row + vector * Simd::kLanes;
        RANKBOOK_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) params[plane][vector] = param(weight, panel, group, begin + plane, at);
        offsets[vector] = first && weight.has_offset ? param(weight, panel, group, weight.planes, at) : Simd::zero();
      }
    }
    const uint8_t* block = codes + half / 2 * kCodeBits * kWordBytes;
    float* to = out + (half * kHalfBlock - k0) * kPanel + row;
    if (half % 2 == 0) {
      // A few tokens wait for memory as one does: the hardware's prefetcher stops where the products begin.
      for (int line = 0; line < kCodeBits * kTile * 4 / 64; ++line) prefetch_codes(block + line * 64);
      decode_half_block<kCodeBits, 0, kPlanes>(block, rows, params, offsets, first, to, kInputs);
    } else {
      decode_half_block<kCodeBits, 1, kPlanes>(block, rows, params, offsets, first, to, kInputs);
    }
  }
}

// ---------------------------------------------------------------------------------------------- many tokens

// acc (kTokens, tile) += x (kTokens, depth) @ w (depth, tile), accumulators in registers.
// Registers: 12 tokens times 2 vectors of 32 with AVX-512, 6 times 2 of 16 with AVX2, which leaves two for the weights
// and one for the input. A row of decoded weights is loaded once for all tokens of the tile; inputs are broadcast from
// memory, for which x needs no packing.
template <int kTokens>
void gemm_tile(const float* x, int64_t stride, const float* w, int64_t depth, float* acc) {
  F sum[kTokens][kVectors];
  RANKBOOK_UNROLL
  for (int token = 0; token < kTokens; ++token) {
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) sum[token][vector] = Simd::load(acc + token * kPanel + vector * Simd::kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F row[kVectors];
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) row[vector] = Simd::load(w + k * kPanel + vector * Simd::kLanes);
    RANKBOOK_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      const F input = Simd::set(x[token * stride + k]);
      RANKBOOK_UNROLL
      for (int vector = 0; vector < kVectors; ++vector) sum[token][vector] = Simd::fma(input, row[vector], sum[token][vector]);
    }
  }
  RANKBOOK_UNROLL
  for (int token = 0; token < kTokens; ++token) {
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) Simd::store(acc + token * kPanel + vector * Simd::kLanes, sum[token][vector]);
  }
}

// A function for each number of tokens: the last tile of a chunk is seldom full, and a loop over a variable number
// would keep sums in memory.
using GemmTile = void (*)(const float*, int64_t, const float*, int64_t, float*);

template <int... kIndex>
GemmTile pick_gemm(int64_t tokens, std::integer_sequence<int, kIndex...>) {
  static constexpr GemmTile kTiles[] = {gemm_tile<kIndex + 1>...};
  return kTiles[tokens - 1];
}

// Tiles of nearly the same number of tokens: one of two loads as much of w as one of six, and has too few sums to hide the
// latency of a multiply-add.
void gemm(const float* x, int64_t stride, int64_t tokens, const float* w, int64_t depth, float* acc) {
  const int64_t tiles = ceil_div(tokens, Simd::kTokens);
  int64_t token = 0;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t count = (tokens - token) / left;
    const GemmTile tile = pick_gemm(count, std::make_integer_sequence<int, Simd::kTokens>{});
    for (int row = 0; row < kPanel; row += kTile) tile(x + token * stride, stride, w + row, depth, acc + token * kPanel + row);
    token += count;
  }
}

// For factors of the error branch, which are int8 in panel order: their scales are in `middle`, so that this is a plain
// conversion.
void expand(const int8_t* codes, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += Simd::kLanes) Simd::store(out + i, Simd::from_int8(codes + i));
}

// ---------------------------------------------------------------------------------------------- dispatch

using GemvTile = void (*)(const CodebookWeight&, int64_t, int, int, bool, const float*, const float*, float*);
using DecodeTile = void (*)(const CodebookWeight&, int64_t, int, int, bool, int64_t, int64_t, float*);

struct Tiles {
  GemvTile gemv;
  DecodeTile decode;
};

template <int kBits, int... kIndex>
const Tiles& pick_planes(int planes, std::integer_sequence<int, kIndex...>) {
  static constexpr Tiles kTiles[] = {{gemv_tile<kBits, kIndex + 1>, decode_tile<kBits, kIndex + 1>}...};
  return kTiles[planes - 1];
}

template <int kBits>
const Tiles& pick_planes(int planes) {
  return pick_planes<kBits>(planes, std::make_integer_sequence<int, kMaxPlanes>{});
}

// Looked up once for a panel, not once for a group: an indirect call a panel is nothing beside 32 rows of codes.
const Tiles& pick_tiles(const CodebookWeight& weight, int planes) {
  switch (weight.bits) {
    case 2:
      return pick_planes<2>(planes);
    case 3:
      return pick_planes<3>(planes);
    case 4:
      return pick_planes<4>(planes);
    default:
      return weight.slopes != nullptr ? pick_planes<kBits8Linear>(planes) : pick_planes<8>(planes);
  }
}

void gemv(const CodebookWeight& weight, int64_t panel, const float* x, const float* group_sums, float* y) {
  for (int begin = 0; begin < weight.planes; begin += kMaxPlanes) {
    const int planes = weight.planes - begin < kMaxPlanes ? weight.planes - begin : kMaxPlanes;
    const GemvTile tile = pick_tiles(weight, planes).gemv;
    const bool offset = begin == 0 && weight.has_offset;
    for (int row = 0; row < kPanel; row += kTile) tile(weight, panel, row, begin, offset, x, group_sums, y + row);
  }
}

void decode(const CodebookWeight& weight, int64_t panel, int64_t k0, int64_t k1, float* out) {
  for (int begin = 0; begin < weight.planes; begin += kMaxPlanes) {
    const int planes = weight.planes - begin < kMaxPlanes ? weight.planes - begin : kMaxPlanes;
    const DecodeTile tile = pick_tiles(weight, planes).decode;
    for (int row = 0; row < kPanel; row += kTile) tile(weight, panel, row, begin, begin == 0, k0, k1, out);
  }
}

constexpr PanelKernels kKernels = {Simd::kName, gemv, decode, gemm, expand};

}  // namespace packed_loops
}  // namespace
}  // namespace rankbook
