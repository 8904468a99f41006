#pragma once

#include <cstdint>
#include <cstring>

namespace rankbook {

// 16-bit IEEE float to fp32, exactly.
inline __attribute__((always_inline)) float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 31U;
  const uint32_t mantissa = half & 1023U;
  // Subnormal fp16 numbers are normal fp32 ones: a product with 2^-24 is exact, where shifting the mantissa would take
  // a loop.
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8F;
    return sign != 0 ? -value : value;
  }
  // 112 is 127 - 15, the difference of the exponents' biases; 31 marks infinity and NaN and stays the largest exponent.
  const uint32_t bits = sign | (exponent == 31 ? 255U << 23 : (exponent + 112U) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 16-bit IEEE float nearest to an fp32 number, ties to even; infinity from 65520 on.
inline uint16_t nearest_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t size = bits & 0x7FFFFFFFU;
  if (size > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);   // not a number
  if (size >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65520
  // Below 2^-14 results are multiples of 2^-24, the last digit of 0.5: an addition rounds to it.
  if (size < 0x38800000U) {
    float shifted;
    std::memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5F;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000U));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000U + 0xFFFU + (size >> 13 & 1U)) >> 13);
}

// bfloat16 to fp32, exactly.
inline __attribute__((always_inline)) float bfloat_to_float(uint16_t stored) {
  const uint32_t bits = static_cast<uint32_t>(stored) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace rankbook
