#pragma once

// One vector register of the instruction set that this translation unit is compiled for: `Simd`. Everything lies in an
// anonymous namespace, since the same names mean different code in each translation unit.
//
// Table<b> holds one row of levels in registers. lookup() takes 32-bit lanes whose low b bits are codes and ignores the
// bits above, so that a shift alone extracts a code.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/simd/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Rows of levels that a loop keeps in registers; builds with sanitizers, which compile slowly, make do with fewer copies.
#if !defined(RANKBOOK_PLANES)
#define RANKBOOK_PLANES 4
#endif

// Loops over registers must be unrolled completely, whatever the compiler thinks of the code size.
#if defined(__clang__)
#define RANKBOOK_UNROLL _Pragma("unroll")
#else
#define RANKBOOK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace rankbook {
namespace {

inline constexpr uint32_t kCarrierFlip = 0x80808080U;  // INT8 carrier (byte - 128) to byte
// A width of its own, so that the choice between look-up and line is a template and not a branch in the loop.
inline constexpr int kBits8Linear = 88;                // 8-bit codes whose levels are a straight line

template <int kBits>
inline constexpr int kLevels = kBits >= 8 ? 256 : 1 << kBits;

}  // namespace
}  // namespace rankbook

#if defined(RANKBOOK_NEON)  // set by the translation units that want it: aarch64 has no other way to ask for less
#include "kernels/cpu/simd/neon.h"
#else

namespace rankbook {
namespace {

#if defined(__AVX512F__)

struct Simd {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;
  static constexpr int kPlanes = RANKBOOK_PLANES;
  // The other registers: two of weights, one of an input, and what the compiler needs.
  static constexpr int kTokens = 12;  // rows of x per GEMM tile: 24 accumulators of 32 registers
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F from_int8(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static F from_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  static I load_words(const uint8_t* from) {
    return _mm512_xor_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(static_cast<int>(kCarrierFlip)));
  }
  template <int kShift>
  static I shift(I words) {
    if constexpr (kShift == 0) return words;
    return _mm512_srli_epi32(words, kShift);
  }
  // (low & kMask) | (high & ~kMask), one instruction of three inputs
  // 0xCA is the truth table of "first ? second : third".
  template <int kMask>
  static I merge(I low, I high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(kMask), low, high, 0xCA);
  }

  template <int kBits>
  struct Table {
    F levels;
    const float* memory;
    explicit Table(const float* row) : memory(row) {
      // One register whatever the width: the price of vpermps does not depend on how many entries are used.
      alignas(64) float wide[16];  // repeated where there are fewer than 16, so that higher bits do not matter
      for (int i = 0; i < 16; ++i) wide[i] = row[i % kLevels<kBits>];
      levels = _mm512_load_ps(wide);
    }
    F lookup(I codes) const {
      if constexpr (kBits == 8) {
        // 16 loads from the first-level cache in one instruction; only learned 8-bit codebooks come here.
        return _mm512_i32gather_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)), memory, 4);
      }
      return _mm512_permutexvar_ps(codes, levels);
    }
  };
  static F line(I codes, F first, F slope) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255))), slope, first);
  }
};

#elif defined(__AVX2__)

struct Simd {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kPlanes = RANKBOOK_PLANES;
  // Rows of x per GEMM tile; the other four registers are two of weights, an input and a spare.
  static constexpr int kTokens = 6;  // 12 accumulators of 16 registers
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F from_int8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static F from_half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  static I load_words(const uint8_t* from) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
                            _mm256_set1_epi32(static_cast<int>(kCarrierFlip)));
  }
  template <int kShift>
  static I shift(I words) {
    if constexpr (kShift == 0) return words;
    return _mm256_srli_epi32(words, kShift);
  }
  template <int kMask>
  static I merge(I low, I high) {
    const I mask = _mm256_set1_epi32(kMask);
    return _mm256_or_si256(_mm256_and_si256(mask, low), _mm256_andnot_si256(mask, high));
  }

  template <int kBits>
  struct Table {
    // 8 lanes hold 8 levels: up to 3 bits one permutation is enough, and `high` is never loaded.
    F low, high;
    const float* memory;
    explicit Table(const float* row) : memory(row) {
      alignas(32) float wide[16];
      for (int i = 0; i < 16; ++i) wide[i] = row[i % kLevels<kBits>];
      low = _mm256_load_ps(wide);
      high = _mm256_load_ps(wide + 8);
    }
    F lookup(I codes) const {
      if constexpr (kBits == 8) {
        return _mm256_i32gather_ps(memory, _mm256_and_si256(codes, _mm256_set1_epi32(255)), 4);
      } else if constexpr (kBits == 4) {  // bit 3, moved to the sign, chooses the half of the table
        const F choose = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), choose);
      }
      return _mm256_permutevar8x32_ps(low, codes);
    }
  };
  static F line(I codes, F first, F slope) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(255))), slope, first);
  }
};

#else

// Plain loops over four lanes, which any compiler turns into whatever vectors the target has.
// For processors without hand-written kernels, and what every other set is tested against. Four lanes, because every
// target with vectors has at least 128 bits.
struct Simd {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;
  static constexpr int kPlanes = RANKBOOK_PLANES < 2 ? RANKBOOK_PLANES : 2;  // fewer copies of the unrolled loops
  static constexpr int kTokens = 4;
  struct F {
    float lane[kLanes];
  };
  struct I {
    uint32_t lane[kLanes];
  };

  static F set(float value) {
    F out;
    for (float& lane : out.lane) lane = value;
    return out;
  }
  static F zero() { return set(0.0F); }
  static F load(const float* from) {
    F out;
    std::memcpy(out.lane, from, sizeof out.lane);
    return out;
  }
  static void store(float* to, F value) { std::memcpy(to, value.lane, sizeof value.lane); }
  static F add(F a, F b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static F from_int8(const int8_t* from) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = static_cast<float>(from[i]);
    return out;
  }
  static F from_half(const uint16_t* from) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = half_to_float(from[i]);
    return out;
  }

  static I load_words(const uint8_t* from) {
    I out;
    std::memcpy(out.lane, from, sizeof out.lane);
    for (uint32_t& lane : out.lane) lane ^= kCarrierFlip;
    return out;
  }
  template <int kShift>
  static I shift(I words) {
    for (uint32_t& lane : words.lane) lane >>= kShift;
    return words;
  }
  template <int kMask>
  static I merge(I low, I high) {
    for (int i = 0; i < kLanes; ++i) low.lane[i] = (low.lane[i] & kMask) | (high.lane[i] & ~static_cast<uint32_t>(kMask));
    return low;
  }

  template <int kBits>
  struct Table {
    const float* memory;
    explicit Table(const float* row) : memory(row) {}
    F lookup(I codes) const {
      F out;
      for (int i = 0; i < kLanes; ++i) out.lane[i] = memory[codes.lane[i] & (kLevels<kBits> - 1)];
      return out;
    }
  };
  static F line(I codes, F first, F slope) {
    for (int i = 0; i < kLanes; ++i) first.lane[i] += slope.lane[i] * static_cast<float>(codes.lane[i] & 255U);
    return first;
  }
};

#endif

}  // namespace
}  // namespace rankbook

#endif  // RANKBOOK_NEON
