#pragma once

// Lanes: what attention needs of a vector of floats beside Simd.

#include "kernels/cpu/simd/simd.h"

#if defined(RANKBOOK_NEON)
#include "kernels/cpu/simd/float_neon.h"
#else

namespace rankbook {
namespace {

#if defined(__AVX512F__)

struct Lanes {
  using F = Simd::F;
  // Four queries times four keys are 16 sums of 32 registers; the loads of queries and keys are shared among them.
  static constexpr int kQueries = 4;  // rows of queries whose products with four keys stay in registers
  static constexpr int kWide = 4;     // vectors of a result that few rows carry

  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is not a number
  // where a < b: small, else large
  static F choose(F a, F b, F small, F large) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), large, small);
  }
  static F size_of(F value) { return _mm512_abs_ps(value); }
  static F with_sign(F value, F sign) {  // value >= 0
    const __m512i bit = _mm512_and_si512(_mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), bit));
  }
  // value * 2^n, n in the low bits of `bits`
  // An integer addition to the exponent field. `bits` comes from adding 1.5 * 2^23, which leaves the whole number in
  // the low mantissa.
  static F scale(F value, F bits) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(bits), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), power));
  }
  static float largest(F value) { return _mm512_reduce_max_ps(value); }
  static float total(F value) { return _mm512_reduce_add_ps(value); }
  // Lane i of the result is the sum of row i.
  // A tree over the whole matrix of 16 x 16: 15 additions and their shuffles instead of 16 reductions of 4 steps each,
  // which is why score_rows takes a vector of keys at a time.
  static F totals(const F* rows) {
    F quads[4];
    RANKBOOK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512d low = _mm512_castps_pd(pairs(rows[i * 4], rows[i * 4 + 1]));
      const __m512d high = _mm512_castps_pd(pairs(rows[i * 4 + 2], rows[i * 4 + 3]));
      const F even = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      quads[i] = _mm512_add_ps(even, _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    return blocks(blocks(quads[0], quads[1]), blocks(quads[2], quads[3]));
  }
  // The 8 elements behind the last whole vector of a head, and zeros.
  // Heads are multiples of 8 elements: a head of 72 or 80 ends inside a vector of 16.
  static F load_half(const float* from) { return _mm512_maskz_loadu_ps(0xFF, from); }

 private:
  static F pairs(F a, F b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static F blocks(F a, F b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD)); }
};

#elif defined(__AVX2__)

struct Lanes {
  using F = Simd::F;
  // Three queries times four keys are 12 sums, which leaves four of the 16 registers for a key and the queries.
  static constexpr int kQueries = 3;
  static constexpr int kWide = 2;

  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F choose(F a, F b, F small, F large) { return _mm256_blendv_ps(large, small, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static F size_of(F value) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value); }
  static F with_sign(F value, F sign) { return _mm256_or_ps(value, _mm256_and_ps(_mm256_set1_ps(-0.0F), sign)); }
  static F scale(F value, F bits) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(bits), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), power));
  }
  static float largest(F value) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static float total(F value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static F totals(const F* rows) {
    const F low = quad(rows);
    const F high = quad(rows + 4);
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
  static F load_half(const float* from) { return Simd::load(from); }  // heads are whole vectors

 private:
  // hadd is three instructions inside, but needs no other register than its inputs.
  static F quad(const F* rows) { return _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3])); }
};

#else

struct Lanes {
  using F = Simd::F;
  static constexpr int kQueries = 2;
  static constexpr int kWide = 2;

  template <class Work>
  static F each(Work&& work) {
    F out;
    for (int i = 0; i < Simd::kLanes; ++i) out.lane[i] = work(i);
    return out;
  }
  static F multiply(F a, F b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F subtract(F a, F b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F divide(F a, F b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F choose(F a, F b, F small, F large) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? small.lane[i] : large.lane[i]; });
  }
  static F size_of(F value) {
    return each([&](int i) { return value.lane[i] < 0.0F ? -value.lane[i] : value.lane[i]; });
  }
  static F with_sign(F value, F sign) {
    return each([&](int i) { return sign.lane[i] < 0.0F ? -value.lane[i] : value.lane[i]; });
  }
  static F scale(F value, F bits) {
    return each([&](int i) {
      uint32_t number;
      uint32_t power;
      std::memcpy(&number, &value.lane[i], sizeof number);
      std::memcpy(&power, &bits.lane[i], sizeof power);
      number += power << 23;
      float out;
      std::memcpy(&out, &number, sizeof out);
      return out;
    });
  }
  static float largest(F value) {
    float out = value.lane[0];
    for (int i = 1; i < Simd::kLanes; ++i) out = value.lane[i] > out ? value.lane[i] : out;
    return out;
  }
  static float total(F value) { return (value.lane[0] + value.lane[1]) + (value.lane[2] + value.lane[3]); }
  static F totals(const F* rows) {
    return each([&](int i) { return total(rows[i]); });
  }
  static F load_half(const float* from) { return Simd::load(from); }
};

#endif

}  // namespace
}  // namespace rankbook

#endif  // RANKBOOK_NEON
