#pragma once

// What a call takes beside its tensors: scratch memory, and fp32 in place of fp16 and bf16.

#include <memory>

#include "kernels/cpu/simd/half.h"
#include "shims/ort/api.h"

namespace rankbook::ort {

// Memory on a cache line: on the stack where it is little, as for a single token, since malloc costs more there than rounding.
class Workspace {
 public:
  // Not cleared: the kernels write what they read.
  explicit Workspace(int64_t bytes) : held_(bytes > kFew ? new uint8_t[static_cast<size_t>(bytes) + kLine] : nullptr) {}
  // Cache lines, because a vector that crosses one costs two loads.
  uint8_t* get() {
    uint8_t* const from = held_ ? held_.get() : few_;
    return from + (kLine - reinterpret_cast<uintptr_t>(from) % kLine) % kLine;
  }

 private:
  // Enough for a token of 4,096 inputs with its sums and scales.
  static constexpr int64_t kFew = 16384;
  static constexpr size_t kLine = 64;
  std::unique_ptr<uint8_t[]> held_;
  uint8_t few_[static_cast<size_t>(kFew) + kLine];
};

// The loops know fp32 alone. `half` says fp16; else the elements are bf16.
inline void widen(const void* from, bool half, int64_t count, float* to) {
  const auto* stored = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = half ? half_to_float(stored[i]) : bfloat_to_float(stored[i]);
}

// Ort's own conversions round to nearest, ties to even.
inline void narrow(const float* from, bool half, int64_t count, void* to) {
  auto* stored = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) stored[i] = half ? Ort::Float16_t(from[i]).val : Ort::BFloat16_t(from[i]).val;
}

}  // namespace rankbook::ort
