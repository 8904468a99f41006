#pragma once

// Bytes: four 8-bit values in each 32-bit lane of Simd, for the int8 mode. A table holds 16 entries; lookup() uses the low
// four bits of each byte of the index and ignores the others.

#include <climits>

#include "kernels/cpu/simd/simd.h"

#if defined(RANKBOOK_NEON)
#include "kernels/cpu/simd/int8_neon.h"
#else

namespace rankbook {
namespace {

#if defined(__AVX2__)
// What both widths do with 16 bytes at a time.
// Once a token and block, so that a pair of 128-bit shuffles is enough for both widths of vectors.
struct Halves {
  // One block of 32 bytes: each half by `from`, then, if asked, 16 bits of the one and of the other in turn.
  template <bool kInterleave>
  static void reorder(const int8_t* block, const uint8_t* from, int8_t* out) {
    const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)), order);
    const __m128i high = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 16)), order);
    auto* to = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(to, kInterleave ? _mm_unpacklo_epi16(low, high) : low);
    _mm_storeu_si128(to + 1, kInterleave ? _mm_unpackhi_epi16(low, high) : high);
  }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

struct Bytes : Halves {
#if defined(__AMX_INT8__)
  static constexpr const char* kName = "amx";
#else
  static constexpr const char* kName = "avx512-vnni";
#endif
  static constexpr int kUnsignedRange = 255;
  static constexpr bool kSignedTables = false;
  // A tile has 12 integer sums and 12 totals of the 32 registers; a pass of gemv holds sums only, so that eight tokens
  // fit.
  static constexpr int kTokens = 6;     // of a tile of gemm
  static constexpr int kFewTokens = 8;  // of one pass of gemv
  // vpdpbusd takes 4 to 5 clocks and may start twice in each: eight sums side by side, 2 vectors times 4
  // chains.
  static constexpr int chains(int planes) { return planes == 1 ? 4 : 2; }
  static constexpr int vectors(int) { return 2; }
  using I = __m512i;

  static I load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static void store(uint8_t* to, I value) { _mm512_storeu_si512(to, value); }
  static I set(int32_t value) { return _mm512_set1_epi32(value); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I flip(I value) { return _mm512_xor_si512(value, _mm512_set1_epi8(INT8_MIN)); }
  static I table(const uint8_t* entries) {  // repeated four times: vpermb reads six bits of the index
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  // vpermb and not vpshufb: it ignores the upper bits of an index, where vpshufb gives zero for a set top bit and would
  // need a mask.
  static I lookup(I entries, I index) { return _mm512_permutexvar_epi8(index, entries); }
  template <int kShift>
  static I shift(I words) {
    return _mm512_srli_epi16(words, kShift);
  }
  template <int kMask>
  static I merge(I low, I high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(kMask), low, high, 0xCA);
  }
  static I dot(I sum, I entries, I x) { return _mm512_dpbusd_epi32(sum, entries, x); }
  static Simd::F to_float(I value) { return _mm512_cvtepi32_ps(value); }

  static I bits_of(Simd::F value) { return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(INT32_MAX)); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(I value) { return _mm512_reduce_max_epi32(value); }
  static int32_t total(I value) { return _mm512_reduce_add_epi32(value); }
  static I round(Simd::F value) { return _mm512_cvtps_epi32(value); }
  static void narrow(int8_t* to, I value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
  }
};

#elif defined(__AVX2__)

struct Bytes : Halves {
#if defined(__AVXVNNI__)
  // AVX-VNNI brings the dot product of AVX-512 to 256-bit registers, without its byte permutation.
  static constexpr const char* kName = "avx-vnni";
  static constexpr int kUnsignedRange = 255;
  static constexpr bool kSignedTables = false;
  static constexpr int chains(int planes) { return planes == 1 ? 3 : 2; }
#else
  static constexpr const char* kName = "avx2";
  static constexpr int kUnsignedRange = 129;  // vpmaddubsw saturates where 2 * 127 * entry exceeds 32767
  static constexpr bool kSignedTables = true;
  static constexpr int chains(int) { return 1; }
#endif
  static constexpr int kTokens = 4;
  static constexpr int kFewTokens = 4;
  // Vectors of rows side by side hide the latency where there are no chains: the three instructions of AVX2 without
  // VNNI are a chain of adds only at their end.
  static constexpr int vectors(int planes) { return planes == 1 && chains(1) == 1 ? 4 : 2; }
  using I = __m256i;

  static I load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store(uint8_t* to, I value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static I set(int32_t value) { return _mm256_set1_epi32(value); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I flip(I value) { return _mm256_xor_si256(value, _mm256_set1_epi8(INT8_MIN)); }
  static I table(const uint8_t* entries) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  static I lookup(I entries, I index) {
    // The mask keeps the top bit of the index clear, for which vpshufb would give zero; it is the third instruction of
    // a look-up here.
    return _mm256_shuffle_epi8(entries, _mm256_and_si256(index, _mm256_set1_epi8(15)));
  }
  template <int kShift>
  static I shift(I words) {
    return _mm256_srli_epi16(words, kShift);
  }
  template <int kMask>
  static I merge(I low, I high) {
    const I mask = _mm256_set1_epi8(kMask);
    return _mm256_or_si256(_mm256_and_si256(mask, low), _mm256_andnot_si256(mask, high));
  }
#if defined(__AVXVNNI__)
  static I dot(I sum, I entries, I x) { return _mm256_dpbusd_avx_epi32(sum, entries, x); }
#else
  // Three instructions where AVX-VNNI has one: pairs in 16 bits, which saturate, then pairs of those.
  // Exact while 2 * 127 * entry stays within 16 bits, which is what kUnsignedRange says.
  static I dot(I sum, I entries, I x) {
    return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(entries, x), _mm256_set1_epi16(1)));
  }
  // |entry| * (x with the entry's sign): two more instructions, no saturation for any int8 entry.
  static I dot_signed(I sum, I entries, I x) { return dot(sum, _mm256_abs_epi8(entries), _mm256_sign_epi8(x, entries)); }
#endif
  static Simd::F to_float(I value) { return _mm256_cvtepi32_ps(value); }

  static I bits_of(Simd::F value) { return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(INT32_MAX)); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static int32_t largest(I value) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
  }
  static int32_t total(I value) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
  }
  static I round(Simd::F value) { return _mm256_cvtps_epi32(value); }
  static void narrow(int8_t* to, I value) {
    // Packing saturates, which rounded values never need: they are at most 127.
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
};

#else

struct Bytes {
  static constexpr const char* kName = "portable";
  static constexpr int kUnsignedRange = 255;
  static constexpr bool kSignedTables = false;
  static constexpr int kTokens = 4;
  // The definition in plain loops. One token a pass: without registers for tables a second one costs a whole one.
  static constexpr int kFewTokens = 1;
  static constexpr int chains(int) { return 1; }
  static constexpr int vectors(int) { return 2; }
  struct I {
    uint8_t byte[16];
    int32_t lane(int i) const {
      int32_t out;
      std::memcpy(&out, byte + 4 * i, sizeof out);
      return out;
    }
    void set_lane(int i, int32_t value) { std::memcpy(byte + 4 * i, &value, sizeof value); }
  };

  template <class Function>
  static I each_byte(Function&& function) {
    I out;
    for (int i = 0; i < 16; ++i) out.byte[i] = static_cast<uint8_t>(function(i));
    return out;
  }
  template <class Function>
  static I each_lane(Function&& function) {
    I out;
    for (int i = 0; i < 4; ++i) out.set_lane(i, function(i));
    return out;
  }
  static I load(const uint8_t* from) {
    I out;
    std::memcpy(out.byte, from, sizeof out.byte);
    return out;
  }
  static void store(uint8_t* to, I value) { std::memcpy(to, value.byte, sizeof value.byte); }
  static I set(int32_t value) {
    return each_lane([=](int) { return value; });
  }
  static I add(I a, I b) {
    return each_lane([&](int i) { return a.lane(i) + b.lane(i); });
  }
  static I flip(I value) {
    return each_byte([&](int i) { return value.byte[i] ^ 0x80; });
  }
  static I table(const uint8_t* entries) { return load(entries); }
  static I lookup(I entries, I index) {
    return each_byte([&](int i) { return entries.byte[index.byte[i] & 15]; });
  }
  template <int kShift>
  static I shift(I words) {  // bits of the neighbouring byte, which vector shifts bring in, do not matter either
    return each_byte([&](int i) { return words.byte[i] >> kShift; });
  }
  template <int kMask>
  static I merge(I low, I high) {
    return each_byte([&](int i) { return (low.byte[i] & kMask) | (high.byte[i] & ~kMask); });
  }
  static I dot(I sum, I entries, I x) {
    return each_lane([&](int i) {
      int32_t out = sum.lane(i);
      for (int j = 4 * i; j < 4 * i + 4; ++j) out += entries.byte[j] * static_cast<int8_t>(x.byte[j]);
      return out;
    });
  }
  static Simd::F to_float(I value) {
    Simd::F out;
    for (int i = 0; i < 4; ++i) out.lane[i] = static_cast<float>(value.lane(i));
    return out;
  }

  static I bits_of(Simd::F value) {
    I out;
    std::memcpy(out.byte, value.lane, sizeof out.byte);
    return each_lane([&](int i) { return out.lane(i) & INT32_MAX; });
  }
  static I max(I a, I b) {
    return each_lane([&](int i) { return a.lane(i) > b.lane(i) ? a.lane(i) : b.lane(i); });
  }
  static int32_t largest(I value) {
    int32_t out = value.lane(0);
    for (int i = 1; i < 4; ++i) out = value.lane(i) > out ? value.lane(i) : out;
    return out;
  }
  static int32_t total(I value) { return value.lane(0) + value.lane(1) + value.lane(2) + value.lane(3); }
  static I round(Simd::F value) {
    return each_lane([&](int i) { return static_cast<int32_t>(__builtin_rintf(value.lane[i])); });
  }
  static void narrow(int8_t* to, I value) {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(value.lane(i));
  }
  template <bool kInterleave>
  static void reorder(const int8_t* block, const uint8_t* from, int8_t* out) {
    int8_t shuffled[32];
    for (int i = 0; i < 32; ++i) shuffled[i] = block[i / 16 * 16 + from[i % 16]];
    for (int i = 0; i < 32; ++i) out[i] = shuffled[kInterleave ? i / 2 % 2 * 16 + i / 4 * 2 + i % 2 : i];
  }
};

#endif

}  // namespace
}  // namespace rankbook

#endif  // RANKBOOK_NEON

namespace rankbook {
namespace {

// a * b + c rounded once, and a * b rounded: the fp32 part of the int8 mode is defined to the last bit.
// Not left to the compiler: with contraction on, it would fuse some products and not others, per instruction set.
inline Simd::F fused(Simd::F a, Simd::F b, Simd::F c) {
#if defined(__AVX2__) || defined(RANKBOOK_NEON)
  return Simd::fma(a, b, c);
#else
  for (int i = 0; i < Simd::kLanes; ++i) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return c;
#endif
}

inline Simd::F multiply(Simd::F a, Simd::F b) {
#if defined(__AVX512F__)
  return _mm512_mul_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_mul_ps(a, b);
#elif defined(RANKBOOK_NEON)
  return vmulq_f32(a, b);
#else
  for (int i = 0; i < Simd::kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
#endif
}

}  // namespace
}  // namespace rankbook
