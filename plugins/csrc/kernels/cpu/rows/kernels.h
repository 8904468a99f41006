#pragma once

// What works on rows between products, included once per instruction set (sets/*.cpp). See plugins/rows.py.

#include <cmath>
#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/power.h"

namespace rankbook {
namespace {
namespace row_loops {

// Why they exist: ONNX Runtime's nodes for them take several times their arithmetic where a row is
// a few hundred elements.
inline constexpr float kLog2E = 1.44269504F;
inline constexpr int kChains = 4;  // sums side by side, which hide the latency of an addition

// Up to a vector of elements, and zeros.
// Rows of 576 are whole vectors on every instruction set; others end in a part, copied so that nothing behind the row
// is read.
struct Part {
  alignas(64) float at[kLanes] = {};
  Part(const float* from, int64_t count) { std::memcpy(at, from, static_cast<size_t>(count) * sizeof *at); }
  F load() const { return Simd::load(at); }
};

inline void store_part(F value, float* to, int64_t count) {
  alignas(64) float all[kLanes];
  Simd::store(all, value);
  std::memcpy(to, all, static_cast<size_t>(count) * sizeof *all);
}

// One pass reads both rows, writes their sum and adds up squares; the second one scales. The row is in the L1 cache by then.
void add_norm(const float* a, const float* b, const float* scale, int64_t size, float epsilon, float* y, float* sum) {
  F squares[kChains];
  RANKBOOK_UNROLL
  for (F& chain : squares) chain = Simd::zero();
  int64_t i = 0;
  const auto add = [&](int64_t at, F& chain) {
    const F both = Simd::add(Simd::load(a + at), Simd::load(b + at));
    Simd::store(sum + at, both);
    chain = Simd::fma(both, both, chain);
  };
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    RANKBOOK_UNROLL
    for (int chain = 0; chain < kChains; ++chain) add(i + chain * kLanes, squares[chain]);
  }
  for (; i + kLanes <= size; i += kLanes) add(i, squares[0]);
  if (i < size) {
    const F both = Simd::add(Part(a + i, size - i).load(), Part(b + i, size - i).load());
    store_part(both, sum + i, size - i);
    squares[1] = Simd::fma(both, both, squares[1]);
  }
  const F all = Simd::add(Simd::add(squares[0], squares[1]), Simd::add(squares[2], squares[3]));
  // One exact square root and division a row: an estimate would save nothing beside two passes over the row.
  const F factor = Simd::set(1.0F / std::sqrt(Lanes::total(all) / static_cast<float>(size) + epsilon));
  for (i = 0; i + kLanes <= size; i += kLanes) {
    Simd::store(y + i, Lanes::multiply(Lanes::multiply(Simd::load(sum + i), factor), Simd::load(scale + i)));
  }
  if (i == size) return;
  const F rest = Lanes::multiply(Part(sum + i, size - i).load(), factor);
  store_part(Lanes::multiply(rest, Part(scale + i, size - i).load()), y + i, size - i);
}

// The exponential of minus the magnitude is at most 1 for either sign: nothing overflows, and one division serves both.
inline F gated(F gate, F up) {
  const F one = Simd::set(1.0F);
  const F small = power(Lanes::multiply(Lanes::size_of(gate), Simd::set(-kLog2E)));  // e^-|gate|
  const F top = Lanes::choose(gate, Simd::zero(), small, one);
  return Lanes::multiply(Lanes::multiply(gate, Lanes::divide(top, Simd::add(one, small))), up);
}

// Elements are independent: any cut into tasks gives the same result, to the last bit.
void swiglu(const float* gate, const float* up, int64_t count, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Simd::store(y + i, gated(Simd::load(gate + i), Simd::load(up + i)));
  if (i < count) store_part(gated(Part(gate + i, count - i).load(), Part(up + i, count - i).load()), y + i, count - i);
}

constexpr RowKernels kKernels = {Simd::kName, add_norm, swiglu};

}  // namespace row_loops
}  // namespace
}  // namespace rankbook
