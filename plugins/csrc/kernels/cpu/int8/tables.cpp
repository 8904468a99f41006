// What the int8 mode makes of levels when a layer is loaded.

#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/int8/int8.h"

namespace rankbook {
namespace {

// The bounds of the definition, plugins/int8.py: below 2^-100 a group counts as zeros, 127 is the largest code.
constexpr float kSmallest = 0x1p-100F;
constexpr float kTop = 127.0F;
constexpr int kLargestLevel = 255;

void range_of(const int32_t* levels, int count, int32_t& low, int32_t& high) {
  low = high = levels[0];
  for (int i = 1; i < count; ++i) {
    low = levels[i] < low ? levels[i] : low;
    high = levels[i] > high ? levels[i] : high;
  }
}

}  // namespace

// Plain code for what happens when a layer is loaded, and for groups whose length is no multiple of 16. nearbyint
// rounds ties to even, as the vector conversions do.
float round_row(const float* values, int64_t count, int8_t* out) {
  float largest = 0.0F;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(values[i]);
    largest = std::fmax(largest, std::fabs(values[i]));
  }
  const bool usable = finite && largest >= kSmallest;
  const float inverse = usable ? kTop / largest : 0.0F;
  for (int64_t i = 0; i < count; ++i) out[i] = usable ? static_cast<int8_t>(std::nearbyint(values[i] * inverse)) : int8_t{0};
  return usable ? largest / kTop : finite ? 0.0F : NAN;
}

// Affine formats have whole levels, and so have many learned codebooks: then the product of codes and activations is
// exact. Others are rounded to int8 with one unit a plane, 1/254 of the largest at most.
float whole_levels(const float* levels, int count, int32_t* out) {
  bool whole = true;
  for (int i = 0; i < count; ++i) whole = whole && levels[i] == std::nearbyint(levels[i]) && std::fabs(levels[i]) <= kLargestLevel;
  if (whole) {
    for (int i = 0; i < count; ++i) out[i] = static_cast<int32_t>(levels[i]);
    int32_t low;
    int32_t high;
    range_of(out, count, low, high);
    if (high - low <= kLargestLevel) return 1.0F;
  }
  int8_t rounded[256];
  const float unit = round_row(levels, count, rounded);
  for (int i = 0; i < count; ++i) out[i] = rounded[i];
  return unit;
}

// The unsigned range is 255 with VNNI, which adds four products in 32 bits, and 129 on AVX2, whose pairs saturate at 16
// bits.
bool needs_signed(const int32_t* levels, int count, const Int8Kernels& kernels) {
  int32_t low;
  int32_t high;
  range_of(levels, count, low, high);
  return high - low > kernels.unsigned_range;
}

// Several tables of the same levels in other orders: the stored bytes have their top bit flipped, and undoing that once
// per level here is free, once per weight in the loop is not.
PlaneTable prepare_table(const int32_t* levels, int bits, bool is_signed) {
  const int count = 1 << bits;
  PlaneTable table;
  int32_t low;
  int32_t high;
  range_of(levels, count, low, high);
  table.centre = is_signed ? low + 128 : low;
  const auto entry = [&](int code) { return static_cast<uint8_t>(levels[code] - table.centre); };
  for (int i = 0; i < 16 && bits < 8; ++i) {
    if (bits == 4) {  // low and high nibble of a byte; the carrier flips bit 3 of the high one
      table.nibble[0][i] = entry(i);
      table.nibble[1][i] = entry(i ^ 8);
    } else if (bits == 3) {  // codes 0 to 5, code 6, code 7 of the eight; bit 3 of the index does not matter
      table.nibble[0][i] = entry(i & 7);
      table.nibble[1][i] = entry((i & 7) ^ 2);
      table.nibble[2][i] = entry((i & 7) ^ 6);
    } else {  // an index holds two codes: low one, high one, high one with the flipped bit
      table.nibble[0][i] = entry(i & 3);
      table.nibble[1][i] = entry(i >> 2);
      table.nibble[2][i] = entry((i >> 2) ^ 2);
    }
  }
  if (bits == 8) {
    table.straight = true;
    for (int code = 0; code < 256; ++code) {
      table.bytes[code ^ 0x80] = entry(code);
      table.straight = table.straight && levels[code] == levels[0] + code;
    }
  }
  return table;
}

}  // namespace rankbook
