#pragma once

// The inner loops of the int8 mode for one panel of 32 rows, included once per instruction set (sets/*.cpp): a
// few tokens (gemv) and the error branch. Many tokens (gemm) are in gemm.h.
//
// Four bytes of levels and four of activations go into one dot product of 32-bit lanes, so a vector of 16 rows takes one
// look-up and one instruction of arithmetic for four inputs. The fp32 part, two multiplications and an addition a row, is
// met once per group, however long it is.

#include <utility>

#include "kernels/cpu/int8/codes.h"
#include "kernels/cpu/int8/gemm.h"
#if defined(__AMX_INT8__)
#include "kernels/cpu/int8/few_tiles.h"
#endif

namespace rankbook {
namespace {
namespace int8_loops {

inline constexpr int kMaxPlanes = RANKBOOK_PLANES;  // planes of a gemv; more go through gemm
inline constexpr int64_t kParamsAhead = 512;        // bytes of parameters: their stream is too slow for the hardware's

// ---------------------------------------------------------------------------------------------- a few tokens

// The integer sums of one group, as many as registers hold beside levels and inputs: more would go through memory in the
// inner loop.
// Vectors of rows per pass: with one token and one plane, AVX2 without VNNI takes all four vectors of a panel, whose
// broadcasts are then shared; more planes or tokens halve that.
template <int kPlanes, int kTokens>
struct Sums {
  static constexpr int kVectors = kTokens == 1 ? Bytes::vectors(kPlanes) : kTokens * kPlanes >= 8 ? 1 : 2;
  // Several chains hide the latency of the dot product.
  static constexpr int kChains = kTokens == 1 ? Bytes::chains(kPlanes) : kTokens == 2 && kPlanes == 1 ? Bytes::chains(2) : 1;
  I sum[kPlanes][kTokens][kVectors][kChains];
  I total(int plane, int token, int vector) const {
    I out = sum[plane][token][vector][0];
    RANKBOOK_UNROLL
    for (int chain = 1; chain < kChains; ++chain) out = Bytes::add(out, sum[plane][token][vector][chain]);
    return out;
  }
  void begin(int plane, int token, I start) {
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) {
      RANKBOOK_UNROLL
      for (int chain = 0; chain < kChains; ++chain) sum[plane][token][vector][chain] = chain == 0 ? start : Bytes::set(0);
    }
  }
};

// One block of 32 inputs. Tokens are the inner loop: an entry that was looked up is multiplied with all of them before the
// next, which is what makes eight tokens cost far less than eight times one.
// Eight lanes of four inputs each; a lane is a look-up per plane and a dot product per plane and token.
template <int kBits, int kPlanes, int kTokens, bool kSigned, int... kIndex>
inline void dot_block(const uint8_t* from, const int8_t* const (&x)[kTokens], int64_t at, const PlaneLevels<kBits>* levels,
                      Sums<kPlanes, kTokens>& sums, std::integer_sequence<int, kIndex...>) {
  using All = Sums<kPlanes, kTokens>;
  RANKBOOK_UNROLL
  for (int vector = 0; vector < All::kVectors; ++vector) {
    const Block<kBits> block(from + vector * kLanes * 4);
    const auto one = [&](auto lane) {
      constexpr int kLane = decltype(lane)::value;
      const I index = block.template index<kLane>();
      I entries[kPlanes];
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) entries[plane] = levels[plane].template entry<kLane>(index);
      RANKBOOK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const I input = broadcast(x[t] + at + 4 * kLane);
        RANKBOOK_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) {
          I& sum = sums.sum[plane][t][vector][kLane % All::kChains];
          sum = dot<kSigned>(sum, entries[plane], input);
        }
      }
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
  }
}

// Parameters lie in a stream of their own, a cache line or two a group.
// 64 bytes a group with one plane and an offset, beside 1 KB of codes at 4 bits and groups of 64: too slow a stream for
// the hardware's prefetcher to follow.
inline void prefetch_params(const CodebookWeight& weight, int64_t panel, int64_t group) {
  const int64_t size = weight.form == ParamForm::kInt8 ? 1 : weight.form == ParamForm::kFloat16 ? 2 : 4;
  const int64_t bytes = weight.param_planes() * kPanel * size;
  const char* from = static_cast<const char*>(weight.params) + (panel * weight.groups + group) * bytes + kParamsAhead;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// Scales the sums of a group and adds them, then its offset.
// The order of operations is that of plugins/int8.py: multiply, then fused multiply-add for each plane, the offset
// last.
template <int kPlanes, int kTokens, class Totals>
inline void add_group(const Int8Weight& weight, int64_t panel, int64_t group, int row, const StagedRows& x,
                      const int64_t* tokens, const Sums<kPlanes, kTokens>& sums, Totals& total) {
  RANKBOOK_UNROLL
  for (int vector = 0; vector < Sums<kPlanes, kTokens>::kVectors; ++vector) {
    const int at = row + vector * kLanes;
    RANKBOOK_UNROLL
    for (int plane = 0; plane < kPlanes; ++plane) {
      const F value = value_of(weight, panel, group, plane, at);
      RANKBOOK_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const F scale = Simd::set(x.scales[group * x.tokens + tokens[t]]);
        total[t][vector] = fused(multiply(Bytes::to_float(sums.total(plane, t, vector)), scale), value, total[t][vector]);
      }
    }
    if (!weight.weight.has_offset) continue;
    const F offset = value_of(weight, panel, group, kPlanes, at);
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      total[t][vector] = fused(Simd::set(x.shifts[group * x.tokens + tokens[t]]), offset, total[t][vector]);
    }
  }
}

// y (kTokens, 32), rows [row, row + vectors * lanes) of a panel. `tokens` says which rows of x.
// Totals stay in registers over all groups of a row. Sums begin with the share of the centre, as in gemm.h.
template <int kBits, int kPlanes, int kTokens, bool kSigned, int... kPlane>
void gemv_rows(const Int8Weight& weight, int64_t panel, int row, const StagedRows& x, const int64_t* tokens, float* y,
               std::integer_sequence<int, kPlane...>) {
  using All = Sums<kPlanes, kTokens>;
  constexpr int kVectors = All::kVectors;
  const CodebookWeight& w = weight.weight;
  const PlaneLevels<kBits> levels[kPlanes] = {PlaneLevels<kBits>(weight.tables[kPlane])...};
  const uint8_t* codes = codes_of(w, panel) + row * 4;
  const int64_t blocks = weight.group_blocks();
  F total[kTokens][kVectors];
  RANKBOOK_UNROLL
  for (auto& vectors : total) {
    RANKBOOK_UNROLL
    for (F& vector : vectors) vector = Simd::zero();
  }
  for (int64_t group = 0; group < w.groups; ++group) {
    All sums;
    const int8_t* inputs[kTokens];
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = group * x.tokens + tokens[t];
      inputs[t] = x.codes + at * blocks * kBlock;
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) sums.begin(plane, t, Bytes::set(weight.tables[plane].centre * x.sums[at]));
    }
    prefetch_params(w, panel, group);
    const uint8_t* from = codes + first_block(weight, group) * kBits * kWordBytes;
    for (int64_t block = 0; block < blocks; ++block, from += kBits * kWordBytes) {
      RANKBOOK_UNROLL
      for (int word = 0; word < kBits; ++word) {
        RANKBOOK_UNROLL
        for (int line = 0; line < kVectors * kLanes * 4; line += 64) prefetch_codes(from + word * kWordBytes + line);
      }
      dot_block<kBits, kPlanes, kTokens, kSigned>(from, inputs, block * kBlock, levels, sums, std::make_integer_sequence<int, 8>{});
    }
    add_group<kPlanes, kTokens>(weight, panel, group, row, x, tokens, sums, total);
  }
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) Simd::store(y + t * kPanel + vector * kLanes, total[t][vector]);
  }
}

// Signed tables only where the unsigned ones would saturate: they take two more instructions (Bytes::dot_signed).
// Learned codebooks are rounded to -127 ... 127, a range that unsigned entries hold with VNNI and not on AVX2, where
// they pay those two; codes of affine formats fit either.
template <int kBits, int kPlanes, int kTokens>
void gemv_panel(const Int8Weight& weight, int64_t panel, const StagedRows& x, const int64_t* tokens, float* y) {
  constexpr auto kRows = Sums<kPlanes, kTokens>::kVectors * kLanes;
  constexpr auto kAll = std::make_integer_sequence<int, kPlanes>{};
  for (int row = 0; row < kPanel; row += kRows) {
    if constexpr (Bytes::kSignedTables) {
      if (weight.is_signed) {
        gemv_rows<kBits, kPlanes, kTokens, true>(weight, panel, row, x, tokens, y + row, kAll);
        continue;
      }
    }
    gemv_rows<kBits, kPlanes, kTokens, false>(weight, panel, row, x, tokens, y + row, kAll);
  }
}

using Gemv = void (*)(const Int8Weight&, int64_t, const StagedRows&, const int64_t*, float*);

// By number of tokens and planes; null where gemm does it.
// Loops are made for 1, 2, 4 and 8 tokens. With more planes than there are loops for, decoding to bytes is as fast.
template <int kBits, int kTokens, int... kIndex>
Gemv pick_planes(int planes, std::integer_sequence<int, kIndex...>) {
  static constexpr Gemv kAll[] = {gemv_panel<kBits, kIndex + 1, kTokens>...};
  return planes <= static_cast<int>(sizeof...(kIndex)) ? kAll[planes - 1] : nullptr;
}

template <int kBits>
Gemv pick_gemv(int64_t tokens, int planes) {
  constexpr auto kOne = std::make_integer_sequence<int, kBits == 8 ? 1 : kMaxPlanes>{};
  constexpr auto kFew = std::make_integer_sequence<int, kBits == 8 || kMaxPlanes == 1 ? 1 : 2>{};
  constexpr int kMost = Bytes::kFewTokens;
  return tokens == 1 ? pick_planes<kBits, 1>(planes, kOne) :
         tokens == 2 ? pick_planes<kBits, kMost < 2 ? kMost : 2>(planes, kFew) :
         tokens <= 4 ? pick_planes<kBits, kMost < 4 ? kMost : 4>(planes, kFew) : pick_planes<kBits, kMost>(planes, kFew);
}

Gemv pick_gemv(int bits, int64_t tokens, int planes) {
  switch (bits) {
    case 2:
      return pick_gemv<2>(tokens, planes);
    case 3:
      return pick_gemv<3>(tokens, planes);
    case 4:
      return pick_gemv<4>(tokens, planes);
    default:
      return pick_gemv<8>(tokens, planes);
  }
}

// Numbers of tokens without a loop of their own take the next larger one, its last tokens doubled: fewer copies of the code,
// and a token more costs little beside reading the weight.
// Measured on AMD Zen 5, 4096 x 4096, 4 bits, one plane: 300 µs for two tokens, 397 for four, 605 for eight, 282 for
// one.
bool gemv(const Int8Weight& weight, int64_t panel, int64_t panels, const StagedRows& x, int64_t first, int64_t tokens, float* y) {
#if defined(__AMX_INT8__)
  // Half of the tokens of a tile take as long as all of them, and the loop of four tokens takes less.
  if (tokens > kTileTokens / 2 && tokens <= kTileTokens && weight.group_blocks() <= kPartBlocks) {
    TileUnit tiles;
    for (int64_t i = 0; i < panels; ++i) few_tokens(tiles, weight, panel + i, x, first, tokens, y + i * tokens * kPanel);
    return true;
  }
#endif
  constexpr int64_t kFew = Bytes::kFewTokens;
  if (tokens > kFew * (weight.weight.planes == 1 ? 1 : 2)) return false;  // a second look-up costs less than a second plane
  for (int64_t done = 0; done < tokens; done += kFew) {
    const int64_t count = tokens - done < kFew ? tokens - done : kFew;
    const Gemv run = pick_gemv(weight.weight.bits, count, weight.weight.planes);
    if (run == nullptr) return false;
    int64_t rows[kFew];
    alignas(64) float all[kFew * kPanel];
    for (int64_t t = 0; t < kFew; ++t) rows[t] = first + done + (t < count ? t : 0);  // one that is there instead of none
    for (int64_t i = 0; i < panels; ++i) {
      run(weight, panel + i, x, rows, all);
      std::memcpy(y + (i * tokens + done) * kPanel, all, static_cast<size_t>(count * kPanel) * sizeof *y);
    }
  }
  return true;
}

// ---------------------------------------------------------------------------------------------- error branch

// total (M, 32) += ranks (M, R; rows stride apart) @ up (R, 32), rank after rank, kVectors vectors of rows at a time.
// `ranks` are fp32, as the definition has them, so that this half is the same in both modes.
template <int kTokens, int kVectors, class Load>
void add_ranks(const float* ranks, int64_t stride, int64_t count, float* total, Load&& load) {
  for (int row = 0; row < kPanel; row += kVectors * kLanes) {
    F sum[kTokens][kVectors];
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[t][v] = Simd::load(total + t * kPanel + row + v * kLanes);
    }
    for (int64_t rank = 0; rank < count; ++rank) {
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const F up = load(rank * kPanel + row + v * kLanes);
        RANKBOOK_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[t][v] = fused(Simd::set(ranks[t * stride + rank]), up, sum[t][v]);
      }
    }
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) Simd::store(total + t * kPanel + row + v * kLanes, sum[t][v]);
    }
  }
}

// Eight tokens share every load of `up`; a single token takes all vectors of the panel, so that the latency of the
// addition is hidden by four rows of sums.
template <class Load>
void add_ranks(const float* ranks, int64_t stride, int64_t tokens, int64_t count, float* total, Load&& load) {
  int64_t token = 0;
  for (; token + 8 <= tokens; token += 8) add_ranks<8, 1>(ranks + token * stride, stride, count, total + token * kPanel, load);
  for (; token < tokens; ++token) {
    add_ranks<1, kPanelVectors>(ranks + token * stride, stride, count, total + token * kPanel, load);
  }
}

void multiply_up(const PanelFactor& up, int64_t panel, int64_t rank, const float* ranks, int64_t stride, int64_t tokens,
                 float* total) {
  const int64_t at = panel * rank * kPanel;
  if (up.codes != nullptr) {
    add_ranks(ranks, stride, tokens, rank, total, [&](int64_t i) { return Simd::from_int8(up.codes + at + i); });
  } else {
    add_ranks(ranks, stride, tokens, rank, total, [&](int64_t i) { return Simd::load(up.values + at + i); });
  }
}

constexpr Int8Kernels kKernels = {Bytes::kName, Bytes::kUnsignedRange, quantize, gemv, gemm, multiply_up};

}  // namespace int8_loops
}  // namespace
}  // namespace rankbook
