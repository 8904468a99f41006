#pragma once

// Simd of simd.h for aarch64: four lanes.

#include <arm_neon.h>

namespace rankbook {
namespace {

// Every aarch64 processor has NEON; only emulated ones have run this, so its speed is unknown.
struct Simd {
  static constexpr const char* kName = "neon";
  static constexpr int kLanes = 4;
  static constexpr int kPlanes = RANKBOOK_PLANES;
  static constexpr int kTokens = 8;  // 16 accumulators of 32 registers
  using F = float32x4_t;
  using I = uint32x4_t;

  static F zero() { return vdupq_n_f32(0.0F); }
  static F set(float value) { return vdupq_n_f32(value); }
  static F load(const float* from) { return vld1q_f32(from); }
  static void store(float* to, F value) { vst1q_f32(to, value); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // Four bytes go through a general register: a vector load would read eight, past the end of the last parameters.
  static F from_int8(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static F from_half(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }

  static I load_words(const uint8_t* from) {
    return veorq_u32(vreinterpretq_u32_u8(vld1q_u8(from)), vdupq_n_u32(kCarrierFlip));
  }
  template <int kShift>
  static I shift(I words) {
    if constexpr (kShift == 0) {
      return words;
    } else {
      return vshrq_n_u32(words, kShift);
    }
  }
  // (low & kMask) | (high & ~kMask)
  template <int kMask>
  static I merge(I low, I high) {
    return vbslq_u32(vdupq_n_u32(kMask), low, high);
  }

  // Levels as bytes: level c begins at byte 4 c of one, two or four registers.
  // NEON permutes bytes, not floats: a code c becomes the byte numbers 4 c to 4 c + 3, by one multiply-add, and tbl
  // looks up in one, two or four registers at once.
  template <int kBits>
  struct Table {
    uint8x16_t bytes[4];
    const float* memory;
    explicit Table(const float* row) : memory(row) {
      for (int i = 0; i < 4; ++i) {
        float four[4];
        for (int j = 0; j < 4; ++j) four[j] = row[(4 * i + j) % kLevels<kBits>];
        bytes[i] = vreinterpretq_u8_f32(vld1q_f32(four));
      }
    }
    F lookup(I codes) const {
      codes = vandq_u32(codes, vdupq_n_u32(kLevels<kBits> - 1));
      if constexpr (kBits == 8) {
        // There is no gather; four loads do what one instruction does on x86.
        const float out[4] = {memory[vgetq_lane_u32(codes, 0)], memory[vgetq_lane_u32(codes, 1)],
                              memory[vgetq_lane_u32(codes, 2)], memory[vgetq_lane_u32(codes, 3)]};
        return vld1q_f32(out);
      } else {
        const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100U), codes, vdupq_n_u32(0x04040404U)));
        if constexpr (kBits == 2) {
          return vreinterpretq_f32_u8(vqtbl1q_u8(bytes[0], at));
        } else if constexpr (kBits == 3) {
          return vreinterpretq_f32_u8(vqtbl2q_u8({{bytes[0], bytes[1]}}, at));
        } else {
          return vreinterpretq_f32_u8(vqtbl4q_u8({{bytes[0], bytes[1], bytes[2], bytes[3]}}, at));
        }
      }
    }
  };
  static F line(I codes, F first, F slope) { return fma(vcvtq_f32_u32(vandq_u32(codes, vdupq_n_u32(255))), slope, first); }
};

}  // namespace
}  // namespace rankbook
