#pragma once

// Narrow: floats as bytes, as bfloat16 and as 16-bit IEEE floats, and sums over lanes that hold a given number.

#include "kernels/cpu/simd/float.h"

namespace rankbook {
namespace {

// bfloat16 nearest to a finite number, ties to even.
inline uint16_t nearest_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

#if defined(__AVX512F__) && !defined(RANKBOOK_NEON)

struct Narrow {
  using F = Simd::F;

  static F from_bytes(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void to_bytes(uint8_t* to, F value) {  // whole numbers from 0 to 255
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(value)));
  }
  static F from_bfloats(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void to_bfloats(uint16_t* to, F value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
  static void to_halves(uint16_t* to, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  // sum + value where a == b
  static F add_where(F sum, F a, F b, F value) {
    return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), sum, value);
  }
};

#elif defined(__AVX2__) && !defined(RANKBOOK_NEON)

struct Narrow {
  using F = Simd::F;

  static F from_bytes(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void to_bytes(uint8_t* to, F value) {
    const __m128i words = narrowed(_mm256_cvttps_epi32(value));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
  static F from_bfloats(const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void to_bfloats(uint16_t* to, F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrowed(_mm256_srli_epi32(up, 16)));
  }
  static void to_halves(uint16_t* to, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F add_where(F sum, F a, F b, F value) {
    return _mm256_add_ps(sum, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), value));
  }

 private:
  static __m128i narrowed(__m256i words) {  // 32 to 16 bits
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

#else

// Loops over four lanes, for NEON too, whose compilers make vectors of them.
struct Narrow {
  using F = Simd::F;
  using Four = float[Simd::kLanes];

  static F from_bytes(const uint8_t* from) {
    return each([&](int i) { return static_cast<float>(from[i]); });
  }
  static void to_bytes(uint8_t* to, F value) {
    Four lane;
    Simd::store(lane, value);
    for (int i = 0; i < Simd::kLanes; ++i) to[i] = static_cast<uint8_t>(lane[i]);
  }
  static F from_bfloats(const uint16_t* from) {
    return each([&](int i) { return bfloat_to_float(from[i]); });
  }
  static void to_bfloats(uint16_t* to, F value) {
    Four lane;
    Simd::store(lane, value);
    for (int i = 0; i < Simd::kLanes; ++i) to[i] = nearest_bfloat(lane[i]);
  }
  static void to_halves(uint16_t* to, F value) {
    Four lane;
    Simd::store(lane, value);
    for (int i = 0; i < Simd::kLanes; ++i) to[i] = nearest_half(lane[i]);
  }
  static F add_where(F sum, F a, F b, F value) {
    Four sums, one, other, values;
    Simd::store(sums, sum);
    Simd::store(one, a);
    Simd::store(other, b);
    Simd::store(values, value);
    return each([&](int i) { return one[i] == other[i] ? sums[i] + values[i] : sums[i]; });
  }

 private:
  template <class Work>
  static F each(Work&& work) {
    Four lane;
    for (int i = 0; i < Simd::kLanes; ++i) lane[i] = work(i);
    return Simd::load(lane);
  }
};

#endif

}  // namespace
}  // namespace rankbook
