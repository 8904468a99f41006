// Reading the packed layout: which words a lane takes, and the codes inside them.
//
// A warp works on one panel of 32 rows. Lane (p = lane / 4, q = lane % 4) takes rows 4 p .. 4 p + 3 of unit 4 step + q;
// a *unit* is what one row holds in one word (2, 4, 8 bits) or in one block of three words (3 bits). The words of four
// rows stand side by side, so a lane reads 16 bytes and a warp whole cache lines, and four rows share one piece of x.
// The tensor-core kernels take as many neighbouring units at once (a *chunk*) as hold at least 16 inputs.
#pragma once

#include "kernels/cuda/platform.cuh"

namespace rankbook::cuda {

template <int kBits>
struct Unit {
  static constexpr int kWords = kBits == 3 ? 3 : 1;               // words per row
  static constexpr int kColumns = kBits == 3 ? 32 : 32 / kBits;   // inputs covered
  static constexpr int kParts = kBits == 3 ? 2 : 1;               // parts that may belong to different groups
  static constexpr int kPairs = kColumns / kParts / 2;            // pairs of neighbouring codes per part
  static constexpr int kPairBits = 2 * kBits;
  static constexpr int kChunk = kColumns < 16 ? 16 / kColumns : 1;  // units of a chunk

  static RB_DEVICE int count(int columns) { return (columns + kBlock - 1) / kBlock * (kBits == 3 ? 1 : kBits); }
};

// Words of four neighbouring rows of one unit.
template <int kBits>
struct FourRows {
  std::uint32_t words[4][Unit<kBits>::kWords];
};

// And of one chunk, as stored: bytes are codes minus 128.
template <int kBits>
struct Chunk {
  static constexpr int kColumns = Unit<kBits>::kChunk * Unit<kBits>::kColumns;
  static constexpr int kLoads = Unit<kBits>::kChunk * Unit<kBits>::kWords;  // pieces of 16 bytes
  static constexpr int kPitch = kLoads * kPanel / 4;                        // from chunk to chunk, in pieces

  FourRows<kBits> units[Unit<kBits>::kChunk];

  RB_DEVICE void load_from(const uint4* first, int from = 0, int to = kLoads) {
#pragma unroll
    for (int i = from; i < to; ++i) {
      const uint4 v = load_codes(first + i * (kPanel / 4));
      auto& words = units[i / Unit<kBits>::kWords].words;
      const int word = i % Unit<kBits>::kWords;
      words[0][word] = v.x, words[1][word] = v.y, words[2][word] = v.z, words[3][word] = v.w;
    }
  }
};

// Asks for the first of a warp's codes, chunks `chunk` to `last` of a panel, before anything else is done: memory then works
// while tables are made and earlier kernels end. 4 KB a warp are 8 MB on a large GPU, what its memory brings in 2 to 4 us,
// and less than any second-level cache has for the blocks that run at once.
constexpr unsigned kPrefetchBytes = 4096;
template <int kBits>
RB_DEVICE void prefetch_codes(const uint4* panel, int chunk, int last) {
  constexpr unsigned kBytes = Chunk<kBits>::kPitch * sizeof(uint4);
  const unsigned bytes = chunk < last ? static_cast<unsigned>(last - chunk) * kBytes : 0u;
  prefetch(panel + static_cast<std::size_t>(chunk) * Chunk<kBits>::kPitch, bytes < kPrefetchBytes ? bytes : kPrefetchBytes);
}

template <int kBits>
RB_DEVICE FourRows<kBits> load_four_rows(const PackedWeight& w, int panel, int unit, int units, int row) {
  FourRows<kBits> rows;
#pragma unroll
  for (int i = 0; i < Unit<kBits>::kWords; ++i) {
    uint4 v = {0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u};  // codes of zero, as they are stored
    if (unit < units) {
      const std::size_t word = (static_cast<std::size_t>(panel) * units + unit) * Unit<kBits>::kWords + i;
      v = load_codes(reinterpret_cast<const uint4*>(w.codes + word * kPanel + row));
    }
    rows.words[0][i] = v.x ^ 0x80808080u;
    rows.words[1][i] = v.y ^ 0x80808080u;
    rows.words[2][i] = v.z ^ 0x80808080u;
    rows.words[3][i] = v.w ^ 0x80808080u;
  }
  return rows;
}

// Codes of inputs 2 j and 2 j + 1 of a unit: the first in the low `bits`, the second above it.
template <int kBits>
RB_DEVICE std::uint32_t code_pair(const std::uint32_t (&words)[Unit<kBits>::kWords], int j) {
  if constexpr (kBits == 3) {
    const int byte = 8 * (j >> 2);
    if ((j & 3) < 3) return (words[j & 3] >> byte) & 63u;
    const std::uint32_t a = words[0], b = words[1], c = words[2];  // the last pair is spread over the three words
    const std::uint32_t last = ((a >> 6) & 0x03030303u) | ((c >> 4) & 0x04040404u) | ((b >> 3) & 0x18181818u) |
                               ((c >> 2) & 0x20202020u);
    return (last >> byte) & 63u;
  } else {
    constexpr std::uint32_t kMask = (1u << Unit<kBits>::kPairBits) - 1u;
    return (words[0] >> (j * Unit<kBits>::kPairBits)) & kMask;
  }
}

// The codes of a 3-bit unit as nibbles: of byte m, codes 8 m + 2 j in the low and 8 m + 2 j + 1 in the high one. The last
// pair is spread over the three words; only there does a stored byte's minus 128 (its highest bit) matter.
RB_DEVICE std::uint32_t nibbles_of_three(const std::uint32_t (&words)[3], int j) {
  if (j < 3) return (words[j % 3] & 0x07070707u) | ((words[j % 3] << 1) & 0x70707070u);
  std::uint32_t last = ((words[2] >> 1) & 0x40404040u) ^ 0x62626262u;
  last ^= (words[1] >> 2) & 0x30303030u;
  last ^= (words[2] >> 4) & 0x04040404u;
  return last ^ ((words[0] >> 6) & 0x03030303u);
}

// Where a lane is in its row of groups. Groups are multiples of 16 inputs or the whole row, parts of a unit at most 16.
struct GroupCursor {
  int group = -1;
  int end = 0;

  // Moves to the group of column k; true if it is another one. Columns past the last group belong to the last group.
  RB_DEVICE bool advance(int k, int size, int groups) {
    if (group >= 0 && (k < end || group == groups - 1)) return false;
    if (group < 0) {
      group = k / size < groups ? k / size : groups - 1;
      end = (group + 1) * size;
    }
    while (k >= end && group < groups - 1) {
      ++group;
      end += size;
    }
    return true;
  }
};

RB_DEVICE float read_float(const Floats& tensor, std::size_t index) {
  return tensor.type == DataType::kFloat32
             ? load(static_cast<const float*>(tensor.data) + index)
             : half_to_float(load(static_cast<const std::uint16_t*>(tensor.data) + index));
}

// Parameter `plane` of rows `row` .. `row` + 3 (row within the panel, a multiple of 4) in one group.
RB_DEVICE void read_params(const PackedWeight& w, int panel, int group, int plane, int row, float (&out)[4]) {
  const std::size_t per_panel = static_cast<std::size_t>(panel) * w.params_planes + plane;
  const std::size_t full =
      ((static_cast<std::size_t>(panel) * w.groups + group) * w.params_planes + plane) * kPanel + row;
  const float base = load(w.base + (w.base_full ? per_panel : 0));
  const float step = w.step_full ? 0.0f : read_float(w.step, per_panel);
  // One word holds the four rows: params (N/32, G, Q, 32) starts on a 4-byte boundary wherever row is a multiple of 4.
  const std::uint32_t packed = w.params_full ? load(reinterpret_cast<const std::uint32_t*>(w.params + full))
                                             : 0x01010101u * static_cast<std::uint8_t>(load(w.params));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = static_cast<float>(static_cast<std::int8_t>(packed >> (8 * i)));
    out[i] = code * (w.step_full ? read_float(w.step, full + i) : step) + base;
  }
}

}  // namespace rankbook::cuda
