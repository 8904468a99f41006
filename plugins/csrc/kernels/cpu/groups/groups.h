#pragma once

#include <cstdint>

namespace rankbook {

// Weights in groups while a layer is quantized, output rows innermost (calibration/fitting/rounding.py): values and codes are
// (G, group, N), codebooks (G, L, N). Fields are 8 bytes each, so that callers in other languages fill the same structures
// (calibration/fitting/native.py).
struct GroupShape {
  int64_t groups;
  int64_t group;
  int64_t rows;    // N
  int64_t levels;  // L: 4, 8 or 16
};

// codes = nearest entry of the codebook, of two equally near ones the smaller; decoded = that entry.
struct RoundGroups {
  GroupShape shape;
  const float* values;
  const float* codebooks;  // in any order
  uint8_t* codes;
  void* decoded;      // (G, group, N), or null
  int64_t bfloat16;   // of decoded: 1 for bfloat16, 0 for fp32
};

// sums = sum of flow over the weights of each code, in the order of the group; place -= sign(flow) * move.
struct StepGroups {
  GroupShape shape;
  const void* flow;     // (G, group, N)
  const uint8_t* codes;
  const float* move;    // (G, N), not negative
  float* place;         // (G, group, N)
  float* sums;          // (G, L, N)
  int64_t bfloat16;     // of flow
};

// mass = sum of energy, value = sum of energy * values over the weights of each code, in the order of the group.
struct MomentGroups {
  GroupShape shape;
  const float* values;
  const float* energy;  // (G, group)
  const uint8_t* codes;
  float* mass;          // (G, L, N)
  float* value;         // (G, L, N)
};

inline constexpr int64_t kFeedbackColumns = 16;

// Rounds up to kFeedbackColumns columns in turn. errors = (work - nearest entry) / pivot, and each error times `factor` is
// taken from the columns after it.
struct FeedbackColumns {
  int64_t columns;
  int64_t rows;            // N
  int64_t levels;          // L
  float* work;             // (columns, N), changed
  const float* codebooks;  // (G, L, N), sorted
  const float* bounds;     // (G, L - 1, N): the boundaries between their cells
  const int64_t* groups;   // (columns): the group of each
  const float* factor;     // (columns, columns), rows `stride` apart: pivots on its diagonal, weights right of it
  int64_t stride;
  uint8_t* ranks;          // (columns, N)
  float* errors;           // (columns, N)
};

}  // namespace rankbook
