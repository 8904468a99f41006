// From codes to int8 levels, four at a time and for every plane: the A operand of mma.m16n8k32.
//
// 2 and 3 bits, and 4 bits with one plane: the levels of a plane are 1, 2 or 4 registers of bytes that a byte permutation
// picks from by codes; no memory is read. 4 bits with more planes and 8 bits: a table in shared memory with an entry for
// each byte of codes, one copy of it in every bank.
//
// Who calls it: decode_int8, as `quads` (four codes of a row for one product of 32 columns), or as `pairs` where planes
// are folded. Levels arrive as bytes that round_activations has made, exact for whole-numbered levels.
#pragma once

#include "kernels/cuda/codes.cuh"
#include "kernels/cuda/int8.cuh"
#include "kernels/cuda/lookup.cuh"

namespace rankbook::cuda {

// A plane of 4-bit levels is 16 bytes, four registers: two permutations by the low three bits of four codes, one that
// picks between them by the fourth. With two planes that is six a quad, and a table is cheaper.
template <int kBits, int kPlanes>
struct ByteRegisters {
  static constexpr int kWords = kBits == 4 ? 4 : kBits - 1;  // registers of a plane
  static constexpr std::size_t kBytes = 0;
  // What one word (or three, of 3 bits) of a row becomes before it is looked up: selectors of two quads each.
  static constexpr int kSelectors = kBits == 3 ? 4 : 2;

  std::uint32_t levels[kPlanes][kWords];

  RB_DEVICE void prepare(const LevelBytes* from, unsigned char*) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) levels[plane][i] = load_fresh(&from->entries[plane][i]);
    }
  }

  // Quads 2 j and 2 j + 1 of a row: four levels of each plane. The order of the inputs is `ordered_column`.
  // A quad is four codes, which become four bytes of operand A. Codes are brought into nibbles, the selectors of PRMT.
  RB_DEVICE void quads(const Chunk<kBits>& chunk, int row, int j, std::uint32_t (&out)[kPlanes][2]) const {
    if constexpr (kBits == 4) {
      const std::uint32_t d = chunk.units[j].words[row][0];
      // PRMT takes selectors of four bits, whose highest would replicate a sign: the codes' own highest bits are cut
      // off and choose later.
      std::uint32_t low = d & 0x77777777u;
      // Which of the two pairs of registers; the stored byte's minus 128 is the highest bit of every second code.
      std::uint32_t pick = and_xor(d >> 1, 0x44444444u, 0x72507250u);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The upper four codes, by the multiplier: the logic pipe is the busy one.
        if (half == 1) low = upper_half(low), pick = upper_half(pick);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const std::uint32_t small = permute(levels[plane][0], levels[plane][1], low);
          out[plane][half] = permute(small, permute(levels[plane][2], levels[plane][3], low), pick);
        }
      }
    } else {
      std::uint32_t codes;  // in nibbles
      if constexpr (kBits == 2) {
        const std::uint32_t d = chunk.units[0].words[row][0];
        codes = j == 0 ? d & 0x33333333u : and_xor(d >> 2, 0x33333333u, 0x20202020u);
      } else {
        codes = nibbles_of_three(chunk.units[0].words[row], j);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1) codes = upper_half(codes);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          out[plane][half] = permute(levels[plane][0], levels[plane][kWords - 1], codes);
        }
      }
    }
  }
};

// An entry is the byte pair of two codes, two planes to a word: 4-bit codes of two planes take one 32-bit look-up for
// two codes and both planes.
template <int kBits, int kPlanes>
struct ByteTable {
  static constexpr bool kSingle = kBits == 8;  // an entry is one code; else two, and half as many planes to a word
  static constexpr int kWords = kSingle ? 1 : (kPlanes + 1) / 2;
  // 32 banks of 4 bytes: as many copies as fit 128 bytes.
  static constexpr int kCopies = kEntryBytes / (4 * kWords);
  static constexpr std::size_t kBytes = static_cast<std::size_t>(256) * kEntryBytes;

  unsigned lane_table;

  // Fills the table. The caller sets a barrier after it.
  // The levels come from the workspace, where the rounding kernel has put them: as bytes, with the centre taken out.
  RB_DEVICE void prepare(const LevelBytes* from, unsigned char* table) {
    lane_table = shared_address(table) + (thread_index() % kCopies) * 4 * kWords;
    const int entry = thread_index();  // 256 threads, 256 entries
    std::uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      std::uint32_t word = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const int plane = kSingle ? byte : 2 * i + byte / 2;
        const int code = kSingle ? entry : (byte % 2 == 0 ? entry & 15 : entry >> 4);
        if (plane < kPlanes) {
          const auto* bytes = reinterpret_cast<const std::uint8_t*>(from->entries[plane]);
          // Bytes 0 and 1 are two codes of the first plane of the word, 2 and 3 of the second; with 8 bits a byte a
          // plane.
          word |= static_cast<std::uint32_t>(load_fresh(bytes + code)) << (8 * byte);
        }
      }
      words[i] = word;
    }
    fill_entry(table, entry ^ 0x80, words);  // looked up as stored, minus 128
  }

  RB_DEVICE void entry(std::uint32_t word, int byte, std::uint32_t (&out)[kWords]) const {
    const unsigned at = permute(word, 0u, 0x4440u + byte) * kEntryBytes + lane_table;
    if constexpr (kWords == 1) {
      read_shared(at, out[0]);
    } else {
      read_shared(at, out[0], out[1]);
    }
  }

  // 4 bits, 2 planes: entries as they are, two codes of both planes. Pairs 2 j and 2 j + 1 of a row.
  RB_DEVICE void pairs(const Chunk<kBits>& chunk, int row, int j, std::uint32_t (&out)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t words[kWords];
      entry(chunk.units[j / 2].words[row][0], 2 * (j % 2) + half, words);
      out[half] = words[0];
    }
  }

  RB_DEVICE void quads(const Chunk<kBits>& chunk, int row, int j, std::uint32_t (&out)[kPlanes][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kSingle) {
        const std::uint32_t word = chunk.units[2 * j + half].words[row][0];
        std::uint32_t e[4][1];
#pragma unroll
        for (int i = 0; i < 4; ++i) entry(word, i, e[i]);
#pragma unroll
        for (int pair = 0; pair < (kPlanes + 1) / 2; ++pair) {  // bytes 2 pair and 2 pair + 1 of the four entries
          // Transposes four entries of four planes into words of one plane.
          const std::uint32_t bytes = pair == 0 ? 0x5140u : 0x7362u;
          const std::uint32_t low = permute(e[0][0], e[1][0], bytes), high = permute(e[2][0], e[3][0], bytes);
          out[2 * pair][half] = permute(low, high, 0x5410u);
          if constexpr (kPlanes > 1) out[2 * pair + 1][half] = permute(low, high, 0x7632u);
        }
      } else {
        const std::uint32_t word = chunk.units[j].words[row][0];
        std::uint32_t first[kWords], second[kWords];
        entry(word, 2 * half, first);
        entry(word, 2 * half + 1, second);
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          out[plane][half] = permute(first[plane / 2], second[plane / 2], plane % 2 == 0 ? 0x5410u : 0x7632u);
        }
      }
    }
  }
};

template <int kBits, int kPlanes>
struct ByteLookupOf {
  using Type = ByteRegisters<kBits, kPlanes>;
};
template <int kPlanes>
struct ByteLookupOf<4, kPlanes> {
  using Type = ByteTable<4, kPlanes>;
};
template <>
struct ByteLookupOf<4, 1> {
  using Type = ByteRegisters<4, 1>;
};
template <int kPlanes>
struct ByteLookupOf<8, kPlanes> {
  using Type = ByteTable<8, kPlanes>;
};

}  // namespace rankbook::cuda
