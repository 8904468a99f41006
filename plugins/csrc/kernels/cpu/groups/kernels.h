#pragma once

// Weights in groups, included once per instruction set (sets/*.cpp). Every result has the bits of the PyTorch code that these
// loops stand in for (calibration/fitting), whatever the instruction set: sums run in the order of a group, lane by lane.

#include <type_traits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/narrow.h"
#include "kernels/cpu/simd/power.h"

namespace rankbook {
namespace {
namespace group_loops {

// A vector of rows that lies in memory whole, or the last few rows of a matrix, which go through a buffer.
template <bool kAll>
struct Rows {
  int64_t count;

  template <class T, class Read>
  F take(const T* from, Read read) const {
    if constexpr (kAll) return read(from);
    alignas(64) T room[kLanes] = {};
    std::memcpy(room, from, static_cast<size_t>(count) * sizeof(T));
    return read(room);
  }
  template <class T, class Write>
  void put(T* to, F value, Write write) const {
    if constexpr (kAll) {
      write(to, value);
    } else {
      alignas(64) T room[kLanes];
      write(room, value);
      std::memcpy(to, room, static_cast<size_t>(count) * sizeof(T));
    }
  }
  F load(const float* from) const { return take(from, Simd::load); }
  F load(const uint16_t* from) const { return take(from, Narrow::from_bfloats); }
  F load(const uint8_t* from) const { return take(from, Narrow::from_bytes); }
  void store(float* to, F value) const { put(to, value, Simd::store); }
  void store(uint16_t* to, F value) const { put(to, value, Narrow::to_bfloats); }
  void store(uint8_t* to, F value) const { put(to, value, Narrow::to_bytes); }
};

// The next vector of rows of the same inputs: rows of a group lie N apart, which no processor foresees.
template <class T>
void ask_for_next(const T* at) {
  __builtin_prefetch(at + kLanes);
}

// work(rows, first row) for every vector of the rows [row, end).
template <class Work>
void each_rows(int64_t row, int64_t end, Work&& work) {
  for (; row + kLanes <= end; row += kLanes) work(Rows<true>{kLanes}, row);
  if (row < end) work(Rows<false>{end - row}, row);
}

// work(number of levels as a constant) for the numbers that there are.
template <class Work>
void with_levels(int64_t levels, Work&& work) {
  if (levels == 4) work(std::integral_constant<int, 4>());
  if (levels == 8) work(std::integral_constant<int, 8>());
  if (levels == 16) work(std::integral_constant<int, 16>());
}

// The codebooks of a vector of rows, sorted, with the code of each entry and the boundaries between their cells.
template <int kLevels>
struct Sorted {
  F value[kLevels];
  F code[kLevels];
  F bound[kLevels - 1];

  template <bool kAll>
  Sorted(const float* codebooks, int64_t stride, Rows<kAll> rows) {
    alignas(64) float values[kLevels][kLanes];
    alignas(64) float codes[kLevels][kLanes];
    for (int i = 0; i < kLevels; ++i) {
      Simd::store(values[i], rows.load(codebooks + i * stride));
      Simd::store(codes[i], Simd::set(static_cast<float>(i)));
    }
    for (int i = 1; i < kLevels; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {  // insertion keeps equal entries in their order; most are sorted already
        const float one = values[i][lane];
        if (!(one < values[i - 1][lane])) continue;
        const float name = codes[i][lane];
        int at = i;
        for (; at > 0 && one < values[at - 1][lane]; --at) {
          values[at][lane] = values[at - 1][lane];
          codes[at][lane] = codes[at - 1][lane];
        }
        values[at][lane] = one;
        codes[at][lane] = name;
      }
    }
    for (int i = 0; i < kLevels; ++i) {
      value[i] = Simd::load(values[i]);
      code[i] = Simd::load(codes[i]);
    }
    for (int i = 0; i + 1 < kLevels; ++i) {
      bound[i] = Lanes::multiply(Simd::add(value[i + 1], value[i]), Simd::set(0.5F));
    }
  }
};

template <int kLevels, class Value, bool kAll>
void round_rows(const RoundGroups& of, int64_t index, int64_t row, Rows<kAll> rows) {
  const GroupShape& shape = of.shape;
  const Sorted<kLevels> sorted(of.codebooks + index * kLevels * shape.rows + row, shape.rows, rows);
  for (int64_t k = 0; k < shape.group; ++k) {
    const int64_t at = (index * shape.group + k) * shape.rows + row;
    ask_for_next(of.values + at);
    const F x = rows.load(of.values + at);
    F value = sorted.value[0];
    F code = sorted.code[0];
    RANKBOOK_UNROLL
    for (int i = 0; i + 1 < kLevels; ++i) {
      value = Lanes::choose(sorted.bound[i], x, sorted.value[i + 1], value);
      code = Lanes::choose(sorted.bound[i], x, sorted.code[i + 1], code);
    }
    rows.store(of.codes + at, code);
    if (of.decoded != nullptr) rows.store(static_cast<Value*>(of.decoded) + at, value);
  }
}

void round(const RoundGroups& of, int64_t index) {
  with_levels(of.shape.levels, [&](auto levels) {
    constexpr int kLevels = decltype(levels)::value;
    each_rows(0, of.shape.rows, [&](auto rows, int64_t row) {
      if (of.bfloat16 != 0) {
        round_rows<kLevels, uint16_t>(of, index, row, rows);
      } else {
        round_rows<kLevels, float>(of, index, row, rows);
      }
    });
  });
}

template <int kLevels, class Value, bool kAll>
void step_rows(const StepGroups& of, int64_t index, int64_t row, Rows<kAll> rows) {
  const GroupShape& shape = of.shape;
  const F move = rows.load(of.move + index * shape.rows + row);
  F sum[kLevels];
  RANKBOOK_UNROLL
  for (F& one : sum) one = Simd::zero();
  for (int64_t k = 0; k < shape.group; ++k) {
    const int64_t at = (index * shape.group + k) * shape.rows + row;
    ask_for_next(static_cast<const Value*>(of.flow) + at);
    ask_for_next(of.place + at);
    const F flow = rows.load(static_cast<const Value*>(of.flow) + at);
    const F code = rows.load(of.codes + at);
    RANKBOOK_UNROLL
    for (int i = 0; i < kLevels; ++i) sum[i] = Narrow::add_where(sum[i], code, Simd::set(static_cast<float>(i)), flow);
    // A weight without gradient stays where it is.
    const F moved = Lanes::choose(Simd::zero(), Lanes::size_of(flow), Lanes::with_sign(move, flow), Simd::zero());
    rows.store(of.place + at, Lanes::subtract(rows.load(of.place + at), moved));
  }
  for (int i = 0; i < kLevels; ++i) rows.store(of.sums + (index * kLevels + i) * shape.rows + row, sum[i]);
}

void step(const StepGroups& of, int64_t index) {
  with_levels(of.shape.levels, [&](auto levels) {
    constexpr int kLevels = decltype(levels)::value;
    each_rows(0, of.shape.rows, [&](auto rows, int64_t row) {
      if (of.bfloat16 != 0) {
        step_rows<kLevels, uint16_t>(of, index, row, rows);
      } else {
        step_rows<kLevels, float>(of, index, row, rows);
      }
    });
  });
}

template <int kLevels, bool kAll>
void moment_rows(const MomentGroups& of, int64_t index, int64_t row, Rows<kAll> rows) {
  const GroupShape& shape = of.shape;
  F mass[kLevels];
  F value[kLevels];
  for (int i = 0; i < kLevels; ++i) mass[i] = value[i] = Simd::zero();
  for (int64_t k = 0; k < shape.group; ++k) {
    const int64_t at = (index * shape.group + k) * shape.rows + row;
    const F energy = Simd::set(of.energy[index * shape.group + k]);
    ask_for_next(of.values + at);
    const F weighted = Lanes::multiply(energy, rows.load(of.values + at));
    const F code = rows.load(of.codes + at);
    RANKBOOK_UNROLL
    for (int i = 0; i < kLevels; ++i) {
      const F own = Simd::set(static_cast<float>(i));
      mass[i] = Narrow::add_where(mass[i], code, own, energy);
      value[i] = Narrow::add_where(value[i], code, own, weighted);
    }
  }
  for (int i = 0; i < kLevels; ++i) {
    const int64_t to = (index * kLevels + i) * shape.rows + row;
    rows.store(of.mass + to, mass[i]);
    rows.store(of.value + to, value[i]);
  }
}

void moments(const MomentGroups& of, int64_t index) {
  with_levels(of.shape.levels, [&](auto levels) {
    constexpr int kLevels = decltype(levels)::value;
    each_rows(0, of.shape.rows, [&](auto rows, int64_t row) { moment_rows<kLevels>(of, index, row, rows); });
  });
}

template <int kLevels, bool kAll>
void feedback_rows(const FeedbackColumns& of, int64_t row, Rows<kAll> rows) {
  F work[kFeedbackColumns];
  for (int64_t i = 0; i < of.columns; ++i) work[i] = rows.load(of.work + i * of.rows + row);
  for (int64_t i = 0; i < of.columns; ++i) {
    const float* codebook = of.codebooks + of.groups[i] * kLevels * of.rows + row;
    const float* bounds = of.bounds + of.groups[i] * (kLevels - 1) * of.rows + row;
    const float* factor = of.factor + i * of.stride;
    F value = rows.load(codebook);
    F rank = Simd::zero();
    RANKBOOK_UNROLL
    for (int level = 1; level < kLevels; ++level) {
      const F bound = rows.load(bounds + (level - 1) * of.rows);
      value = Lanes::choose(bound, work[i], rows.load(codebook + level * of.rows), value);
      rank = Lanes::choose(bound, work[i], Simd::set(static_cast<float>(level)), rank);
    }
    const F error = Lanes::divide(Lanes::subtract(work[i], value), Simd::set(factor[i]));
    rows.store(of.ranks + i * of.rows + row, rank);
    rows.store(of.errors + i * of.rows + row, error);
    for (int64_t later = i + 1; later < of.columns; ++later) {
      work[later] = Lanes::subtract(work[later], Lanes::multiply(Simd::set(factor[later]), error));
    }
  }
}

void feedback(const FeedbackColumns& of, int64_t first, int64_t last) {
  with_levels(of.levels, [&](auto levels) {
    constexpr int kLevels = decltype(levels)::value;
    each_rows(first, last, [&](auto rows, int64_t row) { feedback_rows<kLevels>(of, row, rows); });
  });
}

constexpr GroupKernels kKernels = {Simd::kName, round, step, moments, feedback};

}  // namespace group_loops
}  // namespace
}  // namespace rankbook
