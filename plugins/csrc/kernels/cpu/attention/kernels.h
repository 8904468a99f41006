#pragma once

// The inner loops of attention, included once per instruction set (sets/*.cpp): rows of queries that share one
// head of keys and values, block by block of keys, with the running maximum and sum of a softmax in base 2.
//
// Reading order: products of rows, scores, weights, a tile, preparation.
//
// Query heads that share keys stand side by side as rows of a tile, so that the cache is read once for all of them: a token
// waits for memory, 147 KB a layer at 96 positions of SmolLM2-135M. Base 2 saves a multiplication per score: log2(e) goes into
// the queries, once.

#include <utility>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/narrow.h"
#include "kernels/cpu/simd/power.h"

namespace rankbook {
namespace {
namespace attention_loops {

// Four keys a step, since four queries times four keys of sums fill half of the registers; the other half are loads on
// their way.
inline constexpr int kKeys = 4;                // keys whose products with a few queries stay in registers
inline constexpr int64_t kAhead = 2048;        // elements between the keys in use and those on their way from memory
inline constexpr float kHidden = -3.0e38F;     // a score that no finite one is below; with others its weight is 0

// ---------------------------------------------------------------------------------------------- what is stored

// Keys and values are fp32 or 16-bit floats: a vector of them, and the 8 that a head of 8 more elements than whole vectors
// ends with.
inline F load(const float* from) { return Simd::load(from); }
inline F load(const uint16_t* from) { return Simd::from_half(from); }
inline F load_eight(const float* from) { return Lanes::load_half(from); }
inline F load_eight(const uint16_t* from) {
  uint16_t vector[kLanes < kHeadStep ? kHeadStep : kLanes] = {};
  std::memcpy(vector, from, kHeadStep * sizeof *vector);
  return Simd::from_half(vector);
}

// ---------------------------------------------------------------------------------------------- products of rows

// out (kRows, kVectors) = x (kRows, depth) @ w (depth, kVectors), plus out * factors if there are any. kHalf: only the lower
// 8 lanes of w are there.
// Used for weights times values, and for queries times panels of keys. `factors` are what the running softmax scales
// earlier sums by: multiplied here, where the sums are loaded anyway.
template <int kRows, int kVectors, bool kHalf = false, class Stored>
inline void product(const float* x, int64_t x_stride, const Stored* w, int64_t w_stride, int64_t depth, const float* factors,
                    float* out, int64_t out_stride) {
  F sum[kRows][kVectors];
  RANKBOOK_UNROLL
  for (int row = 0; row < kRows; ++row) {
    RANKBOOK_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      sum[row][i] = factors == nullptr
                        ? Simd::zero()
                        : Lanes::multiply(Simd::load(out + row * out_stride + i * kLanes), Simd::set(factors[row]));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    F line[kVectors];
    RANKBOOK_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      line[i] = kHalf ? load_eight(w + k * w_stride) : load(w + k * w_stride + i * kLanes);
    }
    RANKBOOK_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const F input = Simd::set(x[row * x_stride + k]);
      RANKBOOK_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[row][i] = Simd::fma(input, line[i], sum[row][i]);
    }
  }
  RANKBOOK_UNROLL
  for (int row = 0; row < kRows; ++row) {
    RANKBOOK_UNROLL
    for (int i = 0; i < kVectors; ++i) Simd::store(out + row * out_stride + i * kLanes, sum[row][i]);
  }
}

// The same for any number of columns that is a multiple of 8.
// Few rows take four vectors of columns at a time, since their sums would else be too few to hide the latency of a
// multiply-add.
template <int kRows, class Stored>
void multiply(const float* x, int64_t x_stride, const Stored* w, int64_t w_stride, int64_t depth, const float* factors,
              float* out, int64_t out_stride, int64_t columns) {
  int64_t at = 0;
  if constexpr (kRows <= Lanes::kQueries && Lanes::kWide > 2) {
    for (; at + Lanes::kWide * kLanes <= columns; at += Lanes::kWide * kLanes) {
      product<kRows, Lanes::kWide>(x, x_stride, w + at, w_stride, depth, factors, out + at, out_stride);
    }
  }
  for (; at + 2 * kLanes <= columns; at += 2 * kLanes) {
    product<kRows, 2>(x, x_stride, w + at, w_stride, depth, factors, out + at, out_stride);
  }
  for (; at + kLanes <= columns; at += kLanes) {
    product<kRows, 1>(x, x_stride, w + at, w_stride, depth, factors, out + at, out_stride);
  }
  if constexpr (kLanes > kHeadStep) {
    if (at < columns) product<kRows, 1, true>(x, x_stride, w + at, w_stride, depth, factors, out + at, out_stride);
  }
}

template <class Stored>
using Multiply = void (*)(const float*, int64_t, const Stored*, int64_t, int64_t, const float*, float*, int64_t, int64_t);

template <class Stored, int... kIndex>
Multiply<Stored> pick_multiply(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr Multiply<Stored> kTiles[] = {multiply<kIndex + 1, Stored>...};
  return kTiles[rows - 1];
}

// ---------------------------------------------------------------------------------------------- scores

// Few rows: keys are not transposed, which would read and write them once more. A lane holds part of a sum along the head,
// and the sums of a vector of keys are added up together at the end (Lanes::totals).
// scores (kRows, count; kKeyBlock apart) = q @ keys^T, keys (count, size) as they lie in the cache. Whole vectors are written.
// Values of the same positions are prefetched while keys are read: both streams then arrive together.
template <int kRows, class Stored>
void score_rows(const float* q, int64_t stride, const Stored* keys, const Stored* values, int64_t size, int64_t count,
                float* scores) {
  for (int64_t key = 0; key < count; key += kLanes) {
    F sums[kRows][kLanes];
    RANKBOOK_UNROLL
    for (int part = 0; part < kLanes; part += kKeys) {
      int64_t place[kKeys];
      F sum[kRows][kKeys];
      RANKBOOK_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        const int64_t at = key + part + i < count ? key + part + i : count - 1;
        place[i] = at * size;
        RANKBOOK_UNROLL
        for (int r = 0; r < kRows; ++r) sum[r][i] = Simd::zero();
      }
      int64_t d = 0;
      for (; d + kLanes <= size; d += kLanes) {
        F query[kRows];
        RANKBOOK_UNROLL
        for (int r = 0; r < kRows; ++r) query[r] = Simd::load(q + r * stride + d);
        RANKBOOK_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          const F line = load(keys + place[i] + d);
          __builtin_prefetch(values + place[i] + d);
          __builtin_prefetch(keys + place[i] + d + kAhead);
          RANKBOOK_UNROLL
          for (int r = 0; r < kRows; ++r) sum[r][i] = Simd::fma(query[r], line, sum[r][i]);
        }
      }
      if (kLanes > kHeadStep && d < size) {
        RANKBOOK_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          const F line = load_eight(keys + place[i] + d);
          RANKBOOK_UNROLL
          for (int r = 0; r < kRows; ++r) sum[r][i] = Simd::fma(Lanes::load_half(q + r * stride + d), line, sum[r][i]);
        }
      }
      RANKBOOK_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        RANKBOOK_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][part + i] = sum[r][i];
      }
    }
    RANKBOOK_UNROLL
    for (int r = 0; r < kRows; ++r) Simd::store(scores + r * kKeyBlock + key, Lanes::totals(sums[r]));
  }
}

template <class Stored>
using Score = void (*)(const float*, int64_t, const Stored*, const Stored*, int64_t, int64_t, float*);

template <class Stored, int... kIndex>
Score<Stored> pick_score(int64_t rows, std::integer_sequence<int, kIndex...>) {
  static constexpr Score<Stored> kTiles[] = {score_rows<kIndex + 1, Stored>...};
  return kTiles[rows - 1];
}

// Rows in passes of kQueries: nine query heads on three of keys are one pass of three.
template <class Stored>
void score(const AttentionTile& tile, const Stored* keys, const Stored* values, int64_t count, float* scores) {
  for (int64_t row = 0; row < tile.rows; row += Lanes::kQueries) {
    const int64_t rows = tile.rows - row < Lanes::kQueries ? tile.rows - row : Lanes::kQueries;
    const Score<Stored> work = pick_score<Stored>(rows, std::make_integer_sequence<int, Lanes::kQueries>{});
    work(tile.q + row * tile.stride, tile.stride, keys, values, tile.size, count, scores + row * kKeyBlock);
  }
}

// The same with keys in panels (kKeyPanel side by side, size).
// A panel is 32 keys side by side: a query's element is broadcast, and sums are vertical, as in the products of
// packed/kernels.h.
void score_panels(const AttentionTile& tile, const float* panels, int64_t count, float* scores) {
  const Multiply<float> work = pick_multiply<float>(tile.rows, std::make_integer_sequence<int, Simd::kTokens>{});
  for (int64_t key = 0; key < count; key += kKeyPanel) {
    const float* panel = panels + key * tile.size;
    work(tile.q, tile.stride, panel, kKeyPanel, tile.size, nullptr, scores + key, kKeyBlock, kKeyPanel);
  }
}

// ---------------------------------------------------------------------------------------------- weights

// tanh(x), within 3e-7 of it relatively: a series where 1 - 2^-x would cancel.
// For models with a softcap, e.g. Gemma 2.
inline F tanh_of(F x) {
  constexpr float kTwice = -2.88539008F;  // -2 / ln 2
  const F size = Lanes::size_of(x);
  const F square = Lanes::multiply(x, x);
  F series = Simd::set(62.0F / 2835.0F);
  for (const float term : {-17.0F / 315.0F, 2.0F / 15.0F, -1.0F / 3.0F, 1.0F}) {
    series = Simd::fma(series, square, Simd::set(term));
  }
  const F small = power(Lanes::multiply(size, Simd::set(kTwice)));
  const F one = Simd::set(1.0F);
  const F quotient = Lanes::divide(Lanes::subtract(one, small), Simd::add(one, small));
  return Lanes::choose(size, Simd::set(0.3F), Lanes::multiply(series, x), Lanes::with_sign(quotient, x));
}

// What is known of one row's softmax.
// `highest` begins at the most negative finite number: minus infinity would give NaN in the first subtraction.
struct Softmax {
  float highest = kHidden;
  float total = 0.0F;
};

// The running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): a block with a larger score than any before scales what
// was summed, so the cache is passed once. Hidden keys get a weight of exactly 0 by way of minus infinity.
// Turns scores [0, count) into weights, those outside of [begin, end) into 0; returns the factor of what was summed before.
float weigh(float* scores, int64_t begin, int64_t end, int64_t count, float cap, Softmax& softmax) {
  const int64_t width = ceil_div(count, kLanes) * kLanes;
  if (cap > 0.0F) {
    for (int64_t i = 0; i < width; i += kLanes) {
      Simd::store(scores + i, Lanes::multiply(Simd::set(cap), tanh_of(Simd::load(scores + i))));
    }
  }
  for (int64_t i = 0; i < begin && i < width; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = end < 0 ? 0 : end; i < width; ++i) scores[i] = -__builtin_inff();
  F most = Simd::set(softmax.highest);
  for (int64_t i = 0; i < width; i += kLanes) most = Lanes::max(most, Simd::load(scores + i));
  const float highest = Lanes::largest(most);
  F total = Simd::zero();
  for (int64_t i = 0; i < width; i += kLanes) {
    const F weight = power(Lanes::subtract(Simd::load(scores + i), Simd::set(highest)));
    Simd::store(scores + i, weight);
    total = Simd::add(total, weight);
  }
  alignas(64) float factor[kLanes];
  Simd::store(factor, power(Simd::set(softmax.highest - highest)));
  softmax.highest = highest;
  softmax.total = softmax.total * factor[0] + Lanes::total(total);
  return factor[0];
}

// ---------------------------------------------------------------------------------------------- a tile

// Blocks of 128 keys: 512 bytes of scores a row, and one look at the maximum for each, so that the exponential's factor
// is a small part. Blocks outside of all windows are not visited.
template <class Stored>
void attend_to(const AttentionTile& tile) {
  const auto* all_keys = static_cast<const Stored*>(tile.keys);
  const auto* all_values = static_cast<const Stored*>(tile.values);
  Softmax softmax[kTileRows];
  alignas(64) float factors[kTileRows];
  alignas(64) float scores[kTileRows * kKeyBlock];
  int64_t first = tile.begin[0];
  int64_t last = 0;
  for (int64_t row = 0; row < tile.rows; ++row) {
    first = tile.begin[row] < first ? tile.begin[row] : first;
    last = tile.end[row] > last ? tile.end[row] : last;
    for (int64_t d = 0; d < tile.stride; ++d) tile.out[row * tile.stride + d] = 0.0F;
  }
  const Multiply<Stored> add = pick_multiply<Stored>(tile.rows, std::make_integer_sequence<int, Simd::kTokens>{});
  for (int64_t at = first / kKeyPanel * kKeyPanel; at < last; at += kKeyBlock) {
    const int64_t count = last - at < kKeyBlock ? last - at : kKeyBlock;
    const Stored* values = all_values + at * tile.size;
    if (tile.panels == nullptr) {
      score(tile, all_keys + at * tile.size, values, count, scores);
    } else {
      score_panels(tile, tile.panels + at * tile.size, count, scores);
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      factors[row] = weigh(scores + row * kKeyBlock, tile.begin[row] - at, tile.end[row] - at, count, tile.cap, softmax[row]);
    }
    add(scores, kKeyBlock, values, tile.size, count, factors, tile.out, tile.stride, tile.size);
  }
  for (int64_t row = 0; row < tile.rows; ++row) {
    // Divided once at the end, an element of the head each, instead of a weight each.
    const F share = Simd::set(1.0F / softmax[row].total);
    float* out = tile.out + row * tile.stride;
    for (int64_t d = 0; d < tile.size; d += kLanes) Simd::store(out + d, Lanes::multiply(Simd::load(out + d), share));
  }
}

void attend(const AttentionTile& tile) {
  if (tile.half) {
    attend_to<uint16_t>(tile);
  } else {
    attend_to<float>(tile);
  }
}

// ---------------------------------------------------------------------------------------------- preparation

// out = factor * x, turned by the angles of its position if there are any.
// The halves of a head are turned against each other (the convention of Llama); cos and sin are those of one half. With
// the scale of the softmax in `factor` the scores need no multiplication.
void embed(const float* x, const float* cos, const float* sin, int64_t size, float factor, float* out) {
  const F scale = Simd::set(factor);
  if (cos == nullptr) {
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * factor;
    return;
  }
  const int64_t half = size / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F low = Lanes::multiply(Simd::load(x + i), scale);
    const F high = Lanes::multiply(Simd::load(x + half + i), scale);
    const F c = Simd::load(cos + i);
    const F s = Simd::load(sin + i);
    Simd::store(out + i, Lanes::subtract(Lanes::multiply(low, c), Lanes::multiply(high, s)));
    Simd::store(out + half + i, Simd::fma(high, c, Lanes::multiply(low, s)));
  }
  for (; i < half; ++i) {
    const float low = x[i] * factor;
    const float high = x[half + i] * factor;
    out[i] = low * cos[i] - high * sin[i];
    out[half + i] = high * cos[i] + low * sin[i];
  }
}

void narrow(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Narrow::to_halves(out + i, Simd::load(x + i));
  for (; i < count; ++i) out[i] = nearest_half(x[i]);
}

constexpr AttentionKernels kKernels = {Simd::kName, Simd::kTokens, attend, embed, narrow};

}  // namespace attention_loops
}  // namespace
}  // namespace rankbook
