// The product for few tokens and 16-bit activations: codes become weights in registers and go straight to tensor cores.
//
// Weights are the A operand of mma.m16n8k16 and tokens the eight columns of B, as in QTIP (Tseng et al. 2024): one
// instruction serves up to eight tokens at the price of one. The order of inputs inside an mma step is free as long as
// both operands share it, so every lane multiplies its own unit of its own rows with the same unit of x and no data
// moves between lanes. Fragment rows p and p + 8 are the neighbouring output rows 4 p + 2 i and 4 p + 2 i + 1.
//
// Levels come in pairs from shared memory, one look-up for two weights and all planes. Entries are 128 bytes apart and
// hold one copy per bank (or per two or four banks where an entry takes 8 or 16 bytes), so look-ups never collide.
#pragma once

#include "kernels/cuda/branch.cuh"

namespace rankbook::cuda {

constexpr int kEntryBytes = 128;

// What the planes of a group are multiplied with: fp16 pairs for fp16 weights, floats for bfloat16, whose 8 bits of
// mantissa must be rounded to once, at the end.
template <typename T>
struct Combine;

template <>
struct Combine<Half> {
  using Number = std::uint32_t;
  static RB_DEVICE Number number(float value) { return pack_half(value, value); }
  template <int kPlanes>
  static RB_DEVICE std::uint32_t weights(const std::uint32_t (&levels)[kPlanes], const Number (&factors)[kPlanes],
                                         Number offset) {
    std::uint32_t sum = offset;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) sum = fma_half(levels[plane], factors[plane], sum);
    return sum;
  }
};

template <>
struct Combine<BFloat> {
  using Number = float;
  static RB_DEVICE Number number(float value) { return value; }
  template <int kPlanes>
  static RB_DEVICE std::uint32_t weights(const std::uint32_t (&levels)[kPlanes], const Number (&factors)[kPlanes],
                                         Number offset) {
    float low = offset, high = offset;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const float2 pair = unpack_half(levels[plane]);
      low += pair.x * factors[plane];
      high += pair.y * factors[plane];
    }
    return pack_bfloat(low, high);
  }
};

// The table of level pairs. With 8 bits there are too many pairs: entries are single codes, two planes to a word.
template <int kBits, int kPlanes>
struct PairTable {
  static constexpr bool kSingle = kBits == 8;
  static constexpr int kEntries = 1 << (kSingle ? kBits : 2 * kBits);
  static constexpr int kWords = kSingle ? (kPlanes + 1) / 2 : kPlanes;  // 1, 2 or 4 words of an entry
  static constexpr int kCopies = kEntryBytes / (4 * kWords);
  static constexpr std::size_t kBytes = static_cast<std::size_t>(kEntries) * kEntryBytes;

  // The power of two at or below the largest level of a plane. Levels are stored divided by it and coefficients
  // multiplied: exact, and it keeps both well inside the range of fp16 whatever units a method chose.
  static RB_DEVICE float plane_scale(const PackedWeight& w, int plane) {
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

  static RB_DEVICE float level(const PackedWeight& w, int plane, int code, float scale) {
    return plane < w.planes() ? half_to_float(load(w.levels + (plane << kBits) + code)) / scale : 0.0f;
  }

  static RB_DEVICE void fill(const PackedWeight& w, const float (&scales)[kPlanes], unsigned char* table) {
    for (int entry = thread_index(); entry < kEntries; entry += kWarps * 32) {
      std::uint32_t words[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (kSingle) {
          const float second = 2 * i + 1 < kPlanes ? level(w, 2 * i + 1, entry, scales[(2 * i + 1) % kPlanes]) : 0.0f;
          words[i] = pack_half(level(w, 2 * i, entry, scales[2 * i]), second);
        } else {
          words[i] = pack_half(level(w, i, entry & ((1 << kBits) - 1), scales[i]), level(w, i, entry >> kBits, scales[i]));
        }
      }
      auto* line = reinterpret_cast<std::uint32_t*>(table + entry * kEntryBytes);
      for (int copy = 0; copy < kCopies; ++copy) {
        const int at = (copy + entry) % kCopies;  // neighbouring threads start in different banks
#pragma unroll
        for (int i = 0; i < kWords; ++i) line[at * kWords + i] = words[i];
      }
    }
  }

  static RB_DEVICE void entry(const unsigned char* lane_table, std::uint32_t index, std::uint32_t (&out)[kWords]) {
    const unsigned char* at = lane_table + index * kEntryBytes;
    if constexpr (kWords == 1) {
      out[0] = *reinterpret_cast<const std::uint32_t*>(at);
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      out[0] = v.x, out[1] = v.y;
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(at);
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    }
  }

  // Levels of two neighbouring codes, one word per plane.
  static RB_DEVICE void levels(const unsigned char* lane_table, std::uint32_t pair, std::uint32_t (&out)[kPlanes]) {
    if constexpr (kSingle) {
      std::uint32_t first[kWords], second[kWords];
      entry(lane_table, pair & 255u, first);
      entry(lane_table, pair >> 8, second);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const std::uint32_t a = first[plane / 2], b = second[plane / 2];
        out[plane] = plane % 2 == 0 ? (a & 0xffffu) | (b << 16) : (a >> 16) | (b & 0xffff0000u);
      }
    } else {
      entry(lane_table, pair, out);
    }
  }
};

// 2 kPairs neighbouring activations from column k on, two per word, zero past the end of the row.
template <int kPairs>
RB_DEVICE void load_activations(const std::uint16_t* row, int k, int columns, bool valid, std::uint32_t (&out)[kPairs]) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) out[j] = 0u;
  if (!valid) return;
  if ((columns & 7) == 0) {
    if constexpr (kPairs == 2) {
      if (k >= columns) return;
      const uint2 v = load(reinterpret_cast<const uint2*>(row + k));
      out[0] = v.x, out[1] = v.y;
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; j += 4) {
        if (k + 2 * j >= columns) continue;
        const uint4 v = load(reinterpret_cast<const uint4*>(row + k + 2 * j));
        out[j] = v.x, out[j + 1] = v.y, out[j + 2] = v.z, out[j + 3] = v.w;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    if (k + i < columns) out[i / 2] |= static_cast<std::uint32_t>(load(row + k + i)) << (16 * (i % 2));
  }
}

// Coefficients and offsets of four rows in one group, scaled as the table asks.
template <typename T, int kPlanes>
struct GroupNumbers {
  typename Combine<T>::Number factors[4][kPlanes];
  typename Combine<T>::Number offsets[4];

  RB_DEVICE void read(const PackedWeight& w, int panel, int group, int row, const float (&scales)[kPlanes]) {
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (w.has_offset) read_params(w, panel, group, w.params_planes - 1, row, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) offsets[i] = Combine<T>::number(values[i]);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      values[0] = values[1] = values[2] = values[3] = 0.0f;
      if (plane < w.planes()) read_params(w, panel, group, plane, row, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[i][plane] = Combine<T>::number(values[i] * scales[plane]);
    }
  }
};

// y for up to 8 kTiles tokens. A block per panel; its warps share the columns.
template <int kBits, int kPlanes, int kTiles, typename T>
RB_KERNEL(2) decode_mma(MatmulKernel arguments) {
  using U = Unit<kBits>;
  using Table = PairTable<kBits, kPlanes>;
  const Matmul& m = arguments.m;
  const PackedWeight& w = m.weight;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, panel = block_x();
  const int p = lane >> 2, q = lane & 3, units = U::count(w.columns), size = w.columns / w.groups;
  const auto* x = static_cast<const std::uint16_t*>(m.x);
  unsigned char* shared = shared_memory();

  float scales[kPlanes];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    scales[plane] = plane < w.planes() ? Table::plane_scale(w, plane) : 1.0f;  // the same branch in all lanes
  }
  Table::fill(w, scales, shared);
  barrier();
  const unsigned char* lane_table = shared + (lane % Table::kCopies) * 4 * Table::kWords;

  const int steps = (units + 3) / 4, share = (steps + kWarps - 1) / kWarps;
  const int last = (warp + 1) * share < steps ? (warp + 1) * share : steps;
  GroupCursor cursor;
  GroupNumbers<T, kPlanes> numbers{};
  float sums[2][kTiles][4] = {};
  FourRows<kBits> ahead = load_four_rows<kBits>(w, panel, 4 * warp * share + q, units, 4 * p);
  for (int step = warp * share; step < last; ++step) {
    const FourRows<kBits> rows = ahead;
    const int unit = 4 * step + q;
    if (step + 1 < last) ahead = load_four_rows<kBits>(w, panel, unit + 4, units, 4 * p);
#pragma unroll
    for (int part = 0; part < U::kParts; ++part) {
      const int k = unit * U::kColumns + part * 2 * U::kPairs;
      if (cursor.advance(k, size, w.groups)) numbers.read(w, panel, cursor.group, 4 * p, scales);
      std::uint32_t b[kTiles][U::kPairs];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int token = 8 * tile + p;
        load_activations<U::kPairs>(x + static_cast<std::size_t>(token) * w.columns, k, w.columns, token < m.tokens,
                                    b[tile]);
      }
#pragma unroll
      for (int j = 0; j < U::kPairs; j += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::uint32_t a[4];
#pragma unroll
          for (int s = 0; s < 4; ++s) {  // a0, a1: rows p and p + 8 of the first pair; a2, a3: of the second
            const int row = 2 * i + s % 2;
            std::uint32_t levels[kPlanes];
            Table::levels(lane_table, code_pair<kBits>(rows.words[row], part * U::kPairs + j + s / 2), levels);
            a[s] = Combine<T>::template weights<kPlanes>(levels, numbers.factors[row], numbers.offsets[row]);
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) T::mma(sums[i][tile], a, b[tile][j], b[tile][j + 1]);
        }
      }
    }
  }
  barrier();  // the table is read no more: its memory takes the sums
  auto* partial = reinterpret_cast<float*>(shared) + warp * 8 * kTiles * kPanel;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        partial[(8 * tile + 2 * q + c % 2) * kPanel + 4 * p + 2 * i + c / 2] = sums[i][tile][c];
      }
    }
  }
  barrier();
  reduce_and_store<T>(arguments, reinterpret_cast<float*>(shared), panel, 8 * kTiles, 0);
}

}  // namespace rankbook::cuda
