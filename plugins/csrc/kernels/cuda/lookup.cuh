// From codes to the A operand of mma.m16n8k16: where the levels of a group are kept and how they are picked.
//
// 2 and 3 bits: each lane holds the finished codebook of its group for its four rows in registers (4 or 8 weights a row,
// all planes and the offset already added up) and picks from it with byte permutations; no memory is read, and the
// number of planes matters once per group only. 4 and 8 bits: levels come from a table in shared memory, a pair of codes
// at once, and the planes are added up per weight. Entries are 128 bytes apart and hold one copy per bank (or per two or
// four banks where an entry takes 8 or 16 bytes), so look-ups never collide.
#pragma once

#include "kernels/cuda/codes.cuh"

namespace rankbook::cuda {

// One copy of an entry costs 1 to 2 KB and 3.5 to 6.6 passes a look-up by random codes, eight copies still 2.9 to 4.0
// (simulated); 32 copies, one per bank, cost 32 KB and one pass. There is nothing between that is worth having.
constexpr int kEntryBytes = 128;

// Two weights from their levels: in fp16, a plane at a time, for bfloat16 activations rounded to that type at the end.
// bfloat16 has 8 bits of mantissa: combined in it, three planes would lose what the planes add. fp16 products of levels
// and coefficients have 11.
template <typename T>
struct Combine;

template <>
struct Combine<Half> {
  static RB_DEVICE std::uint32_t finish(std::uint32_t weights) { return weights; }
};

template <>
struct Combine<BFloat> {
  static RB_DEVICE std::uint32_t finish(std::uint32_t weights) {
    const float2 pair = unpack_half(weights);
    return pack_bfloat(pair.x, pair.y);
  }
};

// Coefficients (a slot per plane) and offset (the last slot) of four rows in one group, two rows to a word.
// Two rows to a word: HFMA2 takes either half of a register for both of its lanes for free (spread_half), so that no
// word holds a number twice.
template <int kPlanes>
struct GroupNumbers {
  std::uint32_t pairs[2][kPlanes + 1];

  template <typename T>
  RB_DEVICE std::uint32_t weights(const std::uint32_t (&levels)[kPlanes], int row) const {
    std::uint32_t sum = spread_half(pairs[row / 2][kPlanes], row % 2);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      sum = fma_half(levels[plane], spread_half(pairs[row / 2][plane], row % 2), sum);
    }
    return Combine<T>::finish(sum);
  }
};

// The power of two at or below the largest level of a plane. Levels are used divided by it and coefficients multiplied:
// exact, and it keeps both well inside the range of fp16 whatever units a method chose.
// Every warp computes it for itself, by five shuffles: cheaper than a barrier.
template <int kBits>
RB_DEVICE float plane_scale(const PackedWeight& w, int plane) {
  float largest = 0.0f;
  for (int i = thread_index() & 31; i < 1 << kBits; i += 32) {
    const float level = half_to_float(load(w.levels + (plane << kBits) + i));
    largest = level > largest ? level : (-level > largest ? -level : largest);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = shuffle_xor(largest, mask);
    largest = other > largest ? other : largest;
  }
  return largest > 0.0f ? float_of(bits_of(largest) & 0x7f800000u) : 1.0f;
}

template <int kBits>
RB_DEVICE float scaled_level(const PackedWeight& w, int plane, int code, float scale) {
  return plane < w.planes() ? half_to_float(load(w.levels + (plane << kBits) + code)) / scale : 0.0f;
}

// Fills an entry of a table with copies of its words, 16 bytes at a time: 8 stores a thread instead of 32. Neighbouring
// threads start at different pieces, so that the eight threads of a pass write to different banks; word by word, entries
// of two words met two by two, of four words four by four.
template <int kWords>
RB_DEVICE void fill_entry(unsigned char* table, int entry, const std::uint32_t (&words)[kWords]) {
  auto* line = reinterpret_cast<uint4*>(table + entry * kEntryBytes);
  const uint4 piece = {words[0], words[1 % kWords], words[2 % kWords], words[3 % kWords]};
#pragma unroll
  for (int i = 0; i < kEntryBytes / 16; ++i) line[(i + entry) % (kEntryBytes / 16)] = piece;
}

// 4 and 8 bits. With 8 bits there are too many pairs: entries are single codes, two planes to a word.
// The address of an entry is PRMT, which brings the byte of a pair of codes to the bottom, and IMAD: two instructions
// on two pipes, where shift, mask and add are three on one.
template <typename T, int kBits, int kPlanes>
struct PairTable {
  static constexpr bool kSingle = kBits == 8;
  static constexpr int kEntries = 256;
  static constexpr int kWords = kSingle ? (kPlanes + 1) / 2 : kPlanes;  // 1, 2 or 4 words of an entry
  static constexpr int kCopies = kEntryBytes / (4 * kWords);
  static constexpr std::size_t kBytes = static_cast<std::size_t>(kEntries) * kEntryBytes;

  unsigned lane_table;  // address in shared memory
  GroupNumbers<kPlanes> numbers;

  // Fills the table. The caller sets a barrier after it.
  RB_DEVICE void prepare(const PackedWeight& w, const float (&scales)[kPlanes], unsigned char* table) {
    lane_table = shared_address(table) + (thread_index() % kCopies) * 4 * kWords;
    for (int entry = thread_index(); entry < kEntries; entry += kWarps * 32) {
      std::uint32_t words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (kSingle) {
          const bool two = 2 * i + 1 < kPlanes;
          const float second = two ? scaled_level<kBits>(w, 2 * i + 1, entry, scales[(2 * i + 1) % kPlanes]) : 0.0f;
          words[i] = pack_half(scaled_level<kBits>(w, 2 * i, entry, scales[2 * i]), second);
        } else {
          words[i] = pack_half(scaled_level<kBits>(w, i, entry & ((1 << kBits) - 1), scales[i]),
                               scaled_level<kBits>(w, i, entry >> kBits, scales[i]));
        }
      }
      fill_entry(table, entry ^ 0x80, words);  // bytes are looked up as they are stored, minus 128
    }
  }

  RB_DEVICE void set_group(const GroupNumbers<kPlanes>& group) { numbers = group; }

  RB_DEVICE void entry(std::uint32_t word, int byte, std::uint32_t (&out)[kWords]) const {
    const unsigned at = permute(word, 0u, 0x4440u + byte) * kEntryBytes + lane_table;
    if constexpr (kWords == 1) {
      read_shared(at, out[0]);
    } else if constexpr (kWords == 2) {
      read_shared(at, out[0], out[1]);
    } else {
      read_shared(at, out[0], out[1], out[2], out[3]);
    }
  }

  // Weights of inputs 2 pair and 2 pair + 1 of a chunk.
  // A look-up brings the levels of two neighbouring codes in all planes: 4 bytes a plane, one LDS of 32, 64 or 128
  // bits.
  RB_DEVICE std::uint32_t pair(const Chunk<kBits>& chunk, int row, int pair) const {
    std::uint32_t levels[kPlanes];
    constexpr int kOfUnit = Unit<kBits>::kPairs;
    const std::uint32_t word = chunk.units[pair / kOfUnit].words[row][0];
    if constexpr (kSingle) {
      std::uint32_t first[kWords], second[kWords];
      entry(word, pair % kOfUnit * 2, first);
      entry(word, pair % kOfUnit * 2 + 1, second);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        levels[plane] = permute(first[plane / 2], second[plane / 2], plane % 2 == 0 ? 0x5410u : 0x7632u);
      }
    } else {
      entry(word, pair % kOfUnit, levels);
    }
    return numbers.template weights<T>(levels, row);
  }

  // Operand A of product `j` for rows 2 i and 2 i + 1: a0 and a1 are inputs 4 j, 4 j + 1, the others the next two.
  RB_DEVICE void fragment(const Chunk<kBits>& chunk, int i, int j, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) a[s] = pair(chunk, 2 * i + s % 2, 2 * j + s / 2);
  }

  static RB_DEVICE void arrange(std::uint32_t (&)[Chunk<kBits>::kColumns / 2]) {}
  static constexpr int first_word(int j) { return 2 * j; }
  static constexpr int second_word(int j) { return 2 * j + 1; }
};

// 2 and 3 bits.
// A table in shared memory would need 92 to 157 % of its bandwidth at full memory speed for these widths on A100 and
// H100 (`roofline`); four rows of 4 or 8 finished weights are 8 or 16 registers.
template <typename T, int kBits, int kPlanes>
struct RegisterTable {
  static constexpr int kPairs = 1 << (kBits - 1);  // registers that a row's weights take
  static constexpr std::size_t kBytes = 0;

  std::uint32_t levels[kPlanes][kPairs];
  // 2 bits: the four weights in order. 3 bits: low bytes of the eight weights, then their high bytes.
  std::uint32_t weights[4][kPairs];

  RB_DEVICE void prepare(const PackedWeight& w, const float (&scales)[kPlanes], unsigned char*) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        levels[plane][i] = pack_half(scaled_level<kBits>(w, plane, 2 * i, scales[plane]),
                                     scaled_level<kBits>(w, plane, 2 * i + 1, scales[plane]));
      }
    }
  }

  RB_DEVICE void set_group(const GroupNumbers<kPlanes>& group) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      std::uint32_t pairs[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        std::uint32_t column[kPlanes];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) column[plane] = levels[plane][i];
        pairs[i] = group.template weights<T>(column, row);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if constexpr (kBits == 2) {
          weights[row][i] = pairs[i];
        } else {
          weights[row][i] = permute(pairs[2 * (i % 2)], pairs[2 * (i % 2) + 1], i < 2 ? 0x6420u : 0x7531u);
        }
      }
    }
  }

  // Product j multiplies, of a 2-bit unit, inputs (j, j + 4) and (j + 8, j + 12); of a 3-bit unit the pair j / 2 of
  // bytes 2 (j % 2) and 2 (j % 2) + 1.
  // PRMT picks bytes, so a weight of two bytes takes two selectors a code (2 bits) or two permutations for four codes,
  // low bytes and high bytes apart, and two that join them (3 bits).
  RB_DEVICE void fragment(const Chunk<kBits>& chunk, int i, int j, std::uint32_t (&a)[4]) const {
    const FourRows<kBits>& rows = chunk.units[0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * i + half;
      const std::uint32_t(&table)[kPairs] = weights[row];
      if constexpr (kBits == 2) {
        std::uint32_t codes = (rows.words[row][0] >> (2 * j)) & 0x03030303u;
        if (j == 3) codes ^= 0x02020202u;  // the stored byte's minus 128
        // A code c becomes the byte numbers 2 c and 2 c + 1. Multiplications, because the logic pipe is the busy one.
        a[half] = permute(table[0], table[1], codes * 0x22u + 0x1010u);
        a[2 + half] = permute(table[0], table[1], multiply_high(codes, 0x220000u) + 0x1010u);
      } else {
        std::uint32_t codes = nibbles_of_three(rows.words[row], j >> 1);
        if (j & 1) codes = upper_half(codes);
        const std::uint32_t low = permute(table[0], table[1], codes), high = permute(table[2], table[3], codes);
        a[half] = permute(low, high, 0x5140u);
        a[2 + half] = permute(low, high, 0x7362u);
      }
    }
  }

  // Activations in the order of the products.
  // Once a step and token instead of once a weight; with 3 bits no move is needed, because the order is a matter of
  // which register a product takes.
  static RB_DEVICE void arrange(std::uint32_t (&x)[Chunk<kBits>::kColumns / 2]) {
    if constexpr (kBits == 2) {
      std::uint32_t sorted[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int from = j % 4 / 2 + 4 * (j / 4);
        sorted[2 * (j % 4) + j / 4] = permute(x[from], x[from + 2], j % 2 == 0 ? 0x5410u : 0x7632u);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = sorted[j];
    }
  }
  static constexpr int first_word(int j) { return kBits == 2 ? 2 * j : 8 * (j & 1) + (j >> 1); }
  static constexpr int second_word(int j) { return kBits == 2 ? 2 * j + 1 : first_word(j) + 4; }
};

template <typename T, int kBits, int kPlanes>
struct LookupOf {
  using Type = PairTable<T, kBits, kPlanes>;
};
template <typename T, int kPlanes>
struct LookupOf<T, 2, kPlanes> {
  using Type = RegisterTable<T, 2, kPlanes>;
};
template <typename T, int kPlanes>
struct LookupOf<T, 3, kPlanes> {
  using Type = RegisterTable<T, 3, kPlanes>;
};

}  // namespace rankbook::cuda
