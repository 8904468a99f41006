#pragma once

// Lanes of simd_float.h for aarch64.

namespace rankbook {
namespace {

struct Lanes {
  using F = Simd::F;
  static constexpr int kQueries = 4;
  static constexpr int kWide = 4;

  static F multiply(F a, F b) { return vmulq_f32(a, b); }
  static F subtract(F a, F b) { return vsubq_f32(a, b); }
  static F divide(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F choose(F a, F b, F small, F large) { return vbslq_f32(vcltq_f32(a, b), small, large); }
  static F size_of(F value) { return vabsq_f32(value); }
  static F with_sign(F value, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000U), sign, value); }
  static F scale(F value, F bits) {
    const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(bits), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(value), power));
  }
  static float largest(F value) { return vmaxvq_f32(value); }
  static float total(F value) { return vaddvq_f32(value); }
  // Pairwise additions are an instruction of their own here, so that no shuffles are needed.
  static F totals(const F* rows) { return vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3])); }
  // Vectors of four: every head is whole ones.
  static F load_half(const float* from) { return Simd::load(from); }
};

}  // namespace
}  // namespace rankbook
