#pragma once

// The inner loops of the int8 mode for one panel of 32 rows, included once per instruction set (integer_kernels_*.cpp).
// Reading order: one token (gemv), decoding, many tokens (gemm), error branch.

#include <utility>

#include "kernels/integer_codes.h"

namespace rankbook {
namespace {

inline constexpr int kMaxPlanes = RANKBOOK_PLANES;  // planes of a gemv; more go through gemm
inline constexpr int64_t kAhead = 8192;             // bytes of codes to prefetch ahead: a third faster than none
inline constexpr int64_t kParamsAhead = 512;        // bytes of parameters: their stream is too slow for the hardware's

// ---------------------------------------------------------------------------------------------- one token

template <int kPlanes>
struct Sums {
  static constexpr int kVectors = Bytes::vectors(kPlanes);
  static constexpr int kChains = Bytes::chains(kPlanes);  // several hide the latency of the dot product
  I sum[kPlanes][kVectors][kChains];
  I total(int plane, int vector) const {
    I out = sum[plane][vector][0];
    RANKBOOK_UNROLL
    for (int chain = 1; chain < kChains; ++chain) out = Bytes::add(out, sum[plane][vector][chain]);
    return out;
  }
};

template <int kBits, int kPlanes, bool kSigned, int... kIndex>
inline void dot_block(const uint8_t* from, const int8_t* x, const PlaneLevels<kBits>* levels, Sums<kPlanes>& sums,
                      std::integer_sequence<int, kIndex...>) {
  RANKBOOK_UNROLL
  for (int vector = 0; vector < Sums<kPlanes>::kVectors; ++vector) {
    const Block<kBits> block(from + vector * kLanes * 4);
    const auto one = [&](auto lane) {
      constexpr int kLane = decltype(lane)::value;
      const I index = block.template index<kLane>();
      const I input = broadcast(x + 4 * kLane);
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        I& sum = sums.sum[plane][vector][kLane % Sums<kPlanes>::kChains];
        sum = dot<kSigned>(sum, levels[plane].template entry<kLane>(index), input);
      }
    };
    (one(std::integral_constant<int, kIndex>{}), ...);
  }
}

inline void prefetch_params(const CodebookWeight& weight, int64_t panel, int64_t group) {
  const int64_t size = weight.form == ParamForm::kInt8 ? 1 : weight.form == ParamForm::kFloat16 ? 2 : 4;
  const int64_t bytes = weight.param_planes() * kPanel * size;
  const char* from = static_cast<const char*>(weight.params) + (panel * weight.groups + group) * bytes + kParamsAhead;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// totals (rows) of rows [row, row + vectors * lanes) of a panel.
template <int kBits, int kPlanes, bool kSigned, int... kPlane>
void gemv_rows(const IntegerWeight& weight, int64_t panel, int row, const StagedRows& x, float* y,
               std::integer_sequence<int, kPlane...>) {
  constexpr int kVectors = Sums<kPlanes>::kVectors;
  const CodebookWeight& w = weight.weight;
  const PlaneLevels<kBits> levels[kPlanes] = {PlaneLevels<kBits>(weight.tables[kPlane])...};
  const uint8_t* codes = codes_of(w, panel) + row * 4;
  const int64_t blocks = weight.group_blocks();
  const int8_t* inputs = x.codes;
  F total[kVectors];
  RANKBOOK_UNROLL
  for (F& vector : total) vector = Simd::zero();
  for (int64_t group = 0; group < w.groups; ++group) {
    Sums<kPlanes> sums;
    RANKBOOK_UNROLL
    for (int plane = 0; plane < kPlanes; ++plane) {
      const I start = Bytes::set(weight.tables[plane].centre * x.sums[group]);
      RANKBOOK_UNROLL
      for (int vector = 0; vector < kVectors; ++vector) {
        RANKBOOK_UNROLL
        for (int chain = 0; chain < Sums<kPlanes>::kChains; ++chain) {
          sums.sum[plane][vector][chain] = chain == 0 ? start : Bytes::set(0);
        }
      }
    }
    prefetch_params(w, panel, group);
    const uint8_t* from = codes + first_block(weight, group) * kBits * kWordBytes;
    for (int64_t block = 0; block < blocks; ++block, from += kBits * kWordBytes, inputs += kBlock) {
      RANKBOOK_UNROLL
      for (int word = 0; word < kBits; ++word) {
        RANKBOOK_UNROLL
        for (int line = 0; line < kVectors * kLanes * 4; line += 64) __builtin_prefetch(from + kAhead + word * kWordBytes + line);
      }
      dot_block<kBits, kPlanes, kSigned>(from, inputs, levels, sums, std::make_integer_sequence<int, 8>{});
    }
    const F scale = Simd::set(x.scales[group]);
    const F shift = Simd::set(static_cast<float>(x.sums[group]) * x.scales[group]);
    RANKBOOK_UNROLL
    for (int vector = 0; vector < kVectors; ++vector) {
      const int at = row + vector * kLanes;
      RANKBOOK_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const F product = multiply(Bytes::to_float(sums.total(plane, vector)), scale);
        total[vector] = fused(product, value_of(weight, panel, group, plane, at), total[vector]);
      }
      if (w.has_offset) total[vector] = fused(shift, value_of(weight, panel, group, kPlanes, at), total[vector]);
    }
  }
  RANKBOOK_UNROLL
  for (int vector = 0; vector < kVectors; ++vector) Simd::store(y + vector * kLanes, total[vector]);
}

template <int kBits, int kPlanes>
void gemv_panel(const IntegerWeight& weight, int64_t panel, const StagedRows& x, float* y) {
  constexpr auto kRows = Sums<kPlanes>::kVectors * kLanes;
  constexpr auto kAll = std::make_integer_sequence<int, kPlanes>{};
  for (int row = 0; row < kPanel; row += kRows) {
    if constexpr (Bytes::kSignedTables) {
      if (weight.is_signed) {
        gemv_rows<kBits, kPlanes, true>(weight, panel, row, x, y + row, kAll);
        continue;
      }
    }
    gemv_rows<kBits, kPlanes, false>(weight, panel, row, x, y + row, kAll);
  }
}

using Gemv = void (*)(const IntegerWeight&, int64_t, const StagedRows&, float*);

template <int kBits, int... kIndex>
Gemv pick_gemv(int planes, std::integer_sequence<int, kIndex...>) {
  static constexpr Gemv kAll[] = {gemv_panel<kBits, kIndex + 1>...};
  return kAll[planes - 1];
}

bool gemv(const IntegerWeight& weight, int64_t panel, const StagedRows& x, float* y) {
  constexpr auto kAll = std::make_integer_sequence<int, kMaxPlanes>{};
  const int planes = weight.weight.planes;
  if (planes > kMaxPlanes) return false;
  switch (weight.weight.bits) {
    case 2:
      pick_gemv<2>(planes, kAll)(weight, panel, x, y);
      return true;
    case 3:
      pick_gemv<3>(planes, kAll)(weight, panel, x, y);
      return true;
    case 4:
      pick_gemv<4>(planes, kAll)(weight, panel, x, y);
      return true;
    default:
      if (planes > 1) return false;
      gemv_panel<8, 1>(weight, panel, x, y);
      return true;
  }
}

// ---------------------------------------------------------------------------------------------- decoding

template <int kBits, int... kIndex>
void decode_blocks(const uint8_t* from, const PlaneLevels<kBits>& levels, int64_t blocks, uint8_t* out,
                   std::integer_sequence<int, kIndex...>) {
  for (int64_t block = 0; block < blocks; ++block, from += kBits * kWordBytes, out += 8 * kWordBytes) {
    for (int vector = 0; vector < kPanelVectors; ++vector) {
      const Block<kBits> words(from + vector * kLanes * 4);
      uint8_t* to = out + vector * kLanes * 4;
      (Bytes::store(to + kIndex * kWordBytes, levels.template entry<kIndex>(words.template index<kIndex>())), ...);
    }
  }
}

// Entries of blocks [block, block + blocks) of one plane, out (blocks, 8, 32, 4).
void decode(const IntegerWeight& weight, int64_t panel, int plane, int64_t block, int64_t blocks, uint8_t* out) {
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

// ---------------------------------------------------------------------------------------------- many tokens

template <int kTokens, bool kSigned>
void gemm_tile(const IntegerTile& tile, int64_t token, int row) {
  constexpr int kVectors = 2;
  I sum[kTokens][kVectors];
  int32_t* partial = tile.partial + token * kPanel + row;
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const I start = Bytes::set(tile.centre * tile.sums[(token + t) * tile.groups]);
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[t][v] = tile.first ? start : Bytes::load(reinterpret_cast<const uint8_t*>(partial + t * kPanel + v * kLanes));
    }
  }
  const int8_t* x = tile.x + token * tile.stride;
  const uint8_t* w = tile.entries + row * 4;
  for (int64_t lane = 0; lane < tile.blocks * 8; ++lane, w += kWordBytes, x += 4) {
    I entries[kVectors];
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) entries[v] = Bytes::load(w + v * kLanes * 4);
    RANKBOOK_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const I input = broadcast(x + t * tile.stride);
      RANKBOOK_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[t][v] = dot<kSigned>(sum[t][v], entries[v], input);
    }
  }
  RANKBOOK_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const float scale = tile.scales[(token + t) * tile.groups];
    const F shift = Simd::set(static_cast<float>(tile.sums[(token + t) * tile.groups]) * scale);
    RANKBOOK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      if (!tile.last) {
        Bytes::store(reinterpret_cast<uint8_t*>(partial + t * kPanel + at), sum[t][v]);
        continue;
      }
      float* to = tile.total + (token + t) * kPanel + row + at;
      const F product = multiply(Bytes::to_float(sum[t][v]), Simd::set(scale));
      F total = fused(product, Simd::load(tile.value + row + at), Simd::load(to));
      if (tile.offset != nullptr) total = fused(shift, Simd::load(tile.offset + row + at), total);
      Simd::store(to, total);
    }
  }
}

using Tile = void (*)(const IntegerTile&, int64_t, int);

template <bool kSigned, int... kIndex>
Tile pick_tile(int64_t tokens, std::integer_sequence<int, kIndex...>) {
  static constexpr Tile kAll[] = {gemm_tile<kIndex + 1, kSigned>...};
  return kAll[tokens - 1];
}

void gemm(const IntegerTile& tile, int64_t tokens) {
  constexpr auto kAll = std::make_integer_sequence<int, Bytes::kTokens>{};
  for (int64_t token = 0; token < tokens; token += Bytes::kTokens) {
    const int64_t count = tokens - token < Bytes::kTokens ? tokens - token : Bytes::kTokens;
    Tile run = pick_tile<false>(count, kAll);
    if constexpr (Bytes::kSignedTables) {
      if (tile.is_signed) run = pick_tile<true>(count, kAll);
    }
    for (int row = 0; row < kPanel; row += 2 * kLanes) run(tile, token, row);
  }
}

// ---------------------------------------------------------------------------------------------- error branch

// total (M, 32) += ranks (M, R; rows stride apart) @ up (R, 32), rank after rank, kVectors vectors of rows at a time.
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

constexpr IntegerKernels kIntegerKernels = {Bytes::kName, Bytes::kUnsignedRange, quantize, stage, gemv, decode, values, gemm, multiply_up};

}  // namespace
}  // namespace rankbook
