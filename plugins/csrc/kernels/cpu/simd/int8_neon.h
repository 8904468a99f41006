#pragma once

// Bytes of simd_int8.h for aarch64. Both operands of its dot products are signed, so tables always are.

#include "kernels/cpu/simd/simd.h"

namespace rankbook {
namespace {

struct Bytes {
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr const char* kName = "neon-dotprod";
#else
  static constexpr const char* kName = "neon";
#endif
  static constexpr int kUnsignedRange = -1;     // no levels are that few: every layer gets signed tables
  static constexpr bool kSignedTables = false;  // and dot() takes them
  // 12 sums and 12 totals of the 32 registers, as with AVX-512, of four lanes each.
  static constexpr int kTokens = 6;
  static constexpr int kFewTokens = 4;
  static constexpr int chains(int) { return 1; }
  static constexpr int vectors(int planes) { return planes == 1 ? 4 : 2; }
  using I = uint8x16_t;

  static int32x4_t lanes(I value) { return vreinterpretq_s32_u8(value); }
  static I from_lanes(int32x4_t value) { return vreinterpretq_u8_s32(value); }

  static I load(const uint8_t* from) { return vld1q_u8(from); }
  static void store(uint8_t* to, I value) { vst1q_u8(to, value); }
  static I set(int32_t value) { return from_lanes(vdupq_n_s32(value)); }
  static I add(I a, I b) { return from_lanes(vaddq_s32(lanes(a), lanes(b))); }
  static I flip(I value) { return veorq_u8(value, vdupq_n_u8(0x80)); }
  static I table(const uint8_t* entries) { return vld1q_u8(entries); }
  // tbl gives zero for an index beyond its 16 bytes, so the upper bits of the index are cleared first.
  static I lookup(I entries, I index) { return vqtbl1q_u8(entries, vandq_u8(index, vdupq_n_u8(15))); }
  template <int kShift>
  static I shift(I words) {
    return vshrq_n_u8(words, kShift);
  }
  template <int kMask>
  static I merge(I low, I high) {
    return vbslq_u8(vdupq_n_u8(kMask), low, high);
  }
  // sdot, from Armv8.2 on, is four products a lane in one instruction; before it widening products and two pairwise
  // additions do the same in four.
  static I dot(I sum, I entries, I x) {
    const int8x16_t a = vreinterpretq_s8_u8(entries);
    const int8x16_t b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return from_lanes(vdotq_s32(lanes(sum), a, b));
#else  // two products of at most 128 * 127 fit 16 bits
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return from_lanes(vpadalq_s16(lanes(sum), pairs));
#endif
  }
  static Simd::F to_float(I value) { return vcvtq_f32_s32(lanes(value)); }

  static I bits_of(Simd::F value) { return vandq_u8(vreinterpretq_u8_f32(value), set(INT32_MAX)); }
  static I max(I a, I b) { return from_lanes(vmaxq_s32(lanes(a), lanes(b))); }
  static int32_t largest(I value) { return vmaxvq_s32(lanes(value)); }
  static int32_t total(I value) { return vaddvq_s32(lanes(value)); }
  // vcvtn rounds ties to even, as the definition asks; vcvt would cut off.
  static I round(Simd::F value) { return from_lanes(vcvtnq_s32_f32(value)); }
  static void narrow(int8_t* to, I value) {
    const int16x4_t words = vmovn_s32(lanes(value));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
    std::memcpy(to, &four, sizeof four);
  }
  // One tbl a half; zip interleaves 16 bits of the two as the x86 forms do.
  template <bool kInterleave>
  static void reorder(const int8_t* block, const uint8_t* from, int8_t* out) {
    const uint8x16_t order = vld1q_u8(from);
    const int8x16_t low = vqtbl1q_s8(vld1q_s8(block), order);
    const int8x16_t high = vqtbl1q_s8(vld1q_s8(block + 16), order);
    if constexpr (kInterleave) {
      const int16x8_t a = vreinterpretq_s16_s8(low);
      const int16x8_t b = vreinterpretq_s16_s8(high);
      vst1q_s8(out, vreinterpretq_s8_s16(vzip1q_s16(a, b)));
      vst1q_s8(out + 16, vreinterpretq_s8_s16(vzip2q_s16(a, b)));
    } else {
      vst1q_s8(out, low);
      vst1q_s8(out + 16, high);
    }
  }
};

}  // namespace
}  // namespace rankbook
