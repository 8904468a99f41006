// The product for few tokens and rounded activations: codes become int8 levels in registers and go to integer tensor cores.
//
// Weights are the A operand of mma.m16n8k32, as in `decode_mma`: fragment rows p and p + 8 are the output rows 4 p + 2 i and
// 4 p + 2 i + 1, lane q of a row multiplies its own chunk of columns, and the order of columns inside a product is that in
// which permutations bring out codes. Planes are products of their own. Their exact sums become floats once in a turn (a
// group, or up to 128 columns of it), where they meet the coefficients and scales.
//
// Sums start at the bits of 1.5 * 2^23, so that the integer is the mantissa of the float that it becomes. What the centre of
// the levels adds to every weight belongs to the offset.
//
// For one token the eight columns of B would hold the same numbers eight times. The lanes of a row use that to share the
// work that follows the product: each finishes one row instead of all four. Where a step touches two groups, columns
// of B take the activations of one half each. With 4 bits and two planes, half of the columns multiply by the first plane
// and half by the second (*folded*): entries of the table go into the product as they are, two codes of both planes to a
// word, and columns have zeros where the other plane stands.
//
// Called through Int8Entry for up to 16 tokens whose groups are whole or half steps of 64 columns (128 with 3 bits). It
// computes what plugins/int8.py defines but for the order in which groups are added.
#pragma once

#include "kernels/cuda/lookup_bytes.cuh"

namespace rankbook::cuda {

// A float of this exponent has the value of its mantissa: adding integers to the bits, and one subtraction in the end,
// replace a conversion (I2F runs at a quarter of the rate, on the pipe with 16 lanes).
constexpr int kMagic = 0x4b400000;          // 1.5 * 2^23
constexpr float kMagicFloat = 12582912.0f;

// Coefficients (a slot per plane) and offset (the last slot) of one row or two neighbours.
// With several tokens a lane prepares one row of the 32 for all lanes of the warp; with one token those that it
// finishes itself.
template <int kPlanes, int kRows>
struct RowParams {
  static constexpr int kSlots = kPlanes + 1;
  using Words = std::uint32_t[kSlots];  // as stored, a byte a row; of one row, sign-extended

  unsigned first;       // place of the lane's first row in the first group
  int last;             // from the first plane to the offset
  unsigned per_column;  // groups per column, times 2^32, as in `Steps`
  float step[kSlots], base[kSlots], centre[kPlanes];

  static RB_DEVICE bool exists(const PackedWeight& w, int slot) {
    return slot == kPlanes ? w.has_offset : slot < w.planes();
  }
  RB_DEVICE int at(const PackedWeight& w, int slot) const {
    if (slot == kPlanes) return last;
    return slot < kPlanes - 1 || kPlanes < 4 || exists(w, slot) ? kPanel * slot : 0;  // 4 stands for 3 planes as well
  }

  // kPlanes planes from plane `skip` on; the offset belongs to those who skip none.
  // 32-bit offsets, which int8_plan admits weights for: 64-bit addition is two instructions on a GPU.
  RB_DEVICE RowParams(const PackedWeight& w, const LevelBytes* levels, int panel, int row, int skip) {
    first = kept((static_cast<unsigned>(panel) * w.groups * w.params_planes + skip) * kPanel + row);
    last = w.has_offset && skip == 0 ? kPanel * (w.params_planes - 1) : 0;
    per_column = w.groups == 1 ? 0u : 0xffffffffu / static_cast<unsigned>(w.columns / w.groups) + 1u;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      step[slot] = base[slot] = 0.0f;
      if (slot < kPlanes) centre[slot % kPlanes] = static_cast<float>(load_fresh(&levels->centre[slot + skip]));
      if (!exists(w, slot) || (slot == kPlanes && skip > 0)) continue;
      const float unit = slot < kPlanes ? load_fresh(&levels->unit[slot + skip]) : 1.0f;
      const std::size_t plane = static_cast<std::size_t>(panel) * w.params_planes + at(w, slot) / kPanel + skip;
      step[slot] = read_float(w.step, plane) * unit;
      base[slot] = load(w.base + (w.base_full ? plane : 0)) * unit;
    }
  }

  template <int kParts>
  RB_DEVICE void fetch(const PackedWeight& w, int column, Words& words) const {
    int group = static_cast<int>(multiply_high(static_cast<unsigned>(column), per_column));
    if (kParts == 2 && group >= w.groups) group = w.groups - 1;  // half a step may lie past the end
    const std::int8_t* from = w.params + (first + static_cast<unsigned>(group * w.params_planes * kPanel));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if constexpr (kRows == 1) words[slot] = static_cast<std::uint32_t>(static_cast<int>(load(from + at(w, slot))));
      if constexpr (kRows == 2) words[slot] = load(reinterpret_cast<const std::uint16_t*>(from + at(w, slot)));
    }
  }

  RB_DEVICE void values(const Words& words, int row, float (&out)[kSlots]) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int code = kRows == 1 ? static_cast<int>(words[slot]) : static_cast<std::int8_t>(words[slot] >> (8 * row));
      out[slot] = fused(static_cast<float>(code), step[slot], base[slot]);
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) out[kPlanes] = fused(out[plane], centre[plane], out[kPlanes]);
  }
};

// Who finishes what.
// A product gives each lane 2 rows times 2 tokens of each fragment row. With one token seven of eight columns repeat
// the first, so that the lanes of a row have the same sums and divide what follows among them.
template <int kBits, int kPlanes, int kTokens, int kParts>
struct Shape {
  static constexpr bool kOne = kTokens == 1;
  static constexpr bool kFolded = kOne && kBits == 4 && kPlanes == 2 && kParts == 1;
  static constexpr bool kHalves = kOne && (kParts == 2 || kFolded);  // lanes q and q + 2 do halves of the same rows
  static constexpr int kTiles = kTokens <= 8 ? 1 : 2;
  static constexpr int kSets = kOne ? 1 : kParts;      // B operands, and sums: one token needs one, see above
  static constexpr int kSums = kFolded ? 1 : kPlanes;  // planes with sums of their own
  static constexpr int kRows = kHalves ? 2 : (kOne ? 1 : 4);  // that a lane finishes
  static constexpr int kColumns = kOne ? 1 : 2;        // tokens that it finishes in a tile
  static constexpr int kOwnRows = kOne ? kRows : 1;    // whose parameters it prepares, for itself or for all lanes

  // First row whose parameters the lane prepares, within the panel.
  static RB_DEVICE int row(int p, int q) { return 4 * p + (kHalves ? 2 * (q & 1) : q); }

  // Sum of one plane for the lane's row `row` and token `column` of a tile.
  static RB_DEVICE int pick(const int (&sums)[2][4], int q, int row, int column) {
    if constexpr (!kOne) {
      return sums[row / 2][2 * (row % 2) + column];
    } else if constexpr (kHalves) {
      return (q & 1) != 0 ? sums[1][2 * row] : sums[0][2 * row];
    } else {
      const int even = (q & 2) != 0 ? sums[1][0] : sums[0][0], odd = (q & 2) != 0 ? sums[1][2] : sums[0][2];
      return (q & 1) != 0 ? odd : even;
    }
  }
};

// Shared memory: the table, over it at the end the sums of the warps; behind it, what lanes of a warp tell each other.
// The exchange is double-buffered (2 kValues): lanes may still read a turn's values when the next are written.
template <int kBits, int kPlanes, int kTokens, int kParts>
struct Int8Shared {
  static constexpr std::size_t kTable = ByteLookupOf<kBits, kPlanes>::Type::kBytes;
  static constexpr int kValues = kParts * (kPlanes + 1) * kPanel;  // of a warp and turn
  static constexpr std::size_t kExchange = kTokens == 1 ? 0 : sizeof(float) * kWarps * 2 * kValues;
  static constexpr std::size_t kSums = sizeof(float) * kWarps * kTokens * kPanel;
  static constexpr std::size_t kBytes = kTable + kExchange < kSums ? kSums : kTable + kExchange;
};

// Blocks of a multiprocessor that have room for their registers.
// By what nvcc needs without spilling: 80 registers let three blocks in, 128 two.
constexpr int int8_blocks(int bits, int planes, int tokens, int parts) {
  const bool wide = bits == 3 || bits == 8;  // they need more
  if (tokens > 8 || planes > 2 || (wide && planes == 2 && tokens > 1 && parts > 1)) return 1;
  return parts > 1 || (bits == 8 && planes == 2) || (tokens > 1 && (wide || (bits == 4 && planes == 2))) ? 2 : 3;
}

// y for up to kTokens (1, 8 or 16) tokens. Blocks as for `decode_mma`.
template <int kBits, int kPlanes, int kTokens, int kParts>
RB_KERNEL(int8_blocks(kBits, kPlanes, kTokens, kParts)) decode_int8(Int8Kernel arguments) {
  using C = Chunk<kBits>;
  using Shape = cuda::Shape<kBits, kPlanes, kTokens, kParts>;
  using Params = RowParams<Shape::kSums, Shape::kOwnRows>;
  using Shared = Int8Shared<kBits, kPlanes, kTokens, kParts>;
  constexpr int kTiles = Shape::kTiles, kSets = Shape::kSets, kWords = C::kColumns / 4, kSlots = Params::kSlots;
  const Matmul& m = arguments.k.m;
  const PackedWeight& w = m.weight;
  const Int8Plan& plan = arguments.plan;
  let_next_start();
  const int lane = thread_index() & 31, warp = block_y() * kWarps + (thread_index() >> 5), panel = block_x();
  const int p = lane >> 2, q = lane & 3;
  const int units = Unit<kBits>::count(w.columns), chunks = units / Unit<kBits>::kChunk;
  const int warps = grid_y() * kWarps, share = (plan.turns + warps - 1) / warps;
  const int span = kParts == 1 ? plan.span : 1;
  const int first = warp * share, last = first + share < plan.turns ? first + share : plan.turns;

  // The first codes are on their way while the rest is made ready. Lanes without columns keep what they have: every byte
  // is a valid code, and their activations are zero.
  int chunk = 4 * first * span + q;
  const int last_chunk = 4 * last * span < chunks ? 4 * last * span : chunks;
  const auto* codes = reinterpret_cast<const uint4*>(
      w.codes + static_cast<std::size_t>(panel) * units * Unit<kBits>::kWords * kPanel + 4 * p);
  C ahead = {};
  if (chunk < last_chunk) ahead.load_from(codes + static_cast<unsigned>(chunk * C::kPitch));
  prefetch_codes<kBits>(codes - p, 4 * first * span, last_chunk);
  wait_for_earlier();  // what was rounded follows

  const int own = q >> 1;  // the part of a step, or the plane, that the lane finishes
  const Params params(w, arguments.levels, panel, Shape::row(p, q), Shape::kFolded ? own : 0);
  typename Params::Words words[kSets] = {};
  Rounded rounded[kSets][kTiles][Shape::kColumns];
  int piece = kParts * first;
  const auto fetch = [&] {  // what the turn after this one needs
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int at = piece + (kParts == 1 ? 0 : (Shape::kOne ? own : set));
      params.template fetch<kParts>(w, at * plan.piece, words[set]);
      const Rounded* from = arguments.rounded + static_cast<unsigned>(at * plan.slots + (Shape::kOne ? 0 : 2 * q));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (Shape::kOne) {
          const uint2 v = load_fresh(reinterpret_cast<const uint2*>(from));
          rounded[set][tile][0] = {float_of(v.x), float_of(v.y)};
        } else {
          const uint4 v = load_fresh(reinterpret_cast<const uint4*>(from + 8 * tile));
          rounded[set][tile][0] = {float_of(v.x), float_of(v.y)};
          rounded[set][tile][1] = {float_of(v.z), float_of(v.w)};
        }
      }
    }
    piece += kParts;
  };
  if (first < last) fetch();

  typename ByteLookupOf<kBits, kPlanes>::Type lookup;
  lookup.prepare(arguments.levels, shared_memory());
  barrier();

  const uint4* x[kTiles];
  // One token, two parts: columns of B take the half of the step that is theirs; others read zeros.
  const bool active = !Shape::kOne || kParts == 1 || (p >> 2) == own;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = Shape::kOne ? 0 : 8 * tile + p;  // columns of B do not mix: an absent token may hold another one
    const std::size_t row = static_cast<std::size_t>(token < m.tokens ? token : m.tokens - 1) * plan.padded;
    const std::size_t zeros = static_cast<std::size_t>(m.tokens) * plan.padded;
    x[tile] = reinterpret_cast<const uint4*>(arguments.ordered + (active ? row : zeros));
  }
  std::uint32_t mask[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) mask[set] = kSets == 1 || set == own ? 0xffffffffu : 0u;

  // Folded: two activations at the bytes of the lane's plane.
  [[maybe_unused]] const std::uint32_t fold = p < 4 ? 0x4410u : 0x1044u;
  const int start[4] = {kMagic, kMagic, kMagic, kMagic};
  int sums[kSets][kTiles][Shape::kSums][2][4];
  const auto multiply = [&](auto fresh) {  // one step
    std::uint32_t b[kTiles][kWords];
    const unsigned x_chunk = Shape::kOne && kParts == 2 && !active ? 0u : static_cast<unsigned>(chunk);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = load_fresh(x[tile] + x_chunk * (C::kColumns / 16) + i);
        b[tile][4 * i] = v.x, b[tile][4 * i + 1] = v.y, b[tile][4 * i + 2] = v.z, b[tile][4 * i + 3] = v.w;
      }
    }
    chunk += 4;
    // Codes of the next step. Where a chunk has several pieces, each is fetched as soon as the last one there is used up.
    constexpr int kPieces = kBits < 4 ? 1 : 2;
    const auto* next = codes + static_cast<unsigned>(chunk * C::kPitch);
    const C now = ahead;
    const auto fetch_ahead = [&](int piece) {
      if (chunk < last_chunk) ahead.load_from(next, piece * C::kLoads / kPieces, (piece + 1) * C::kLoads / kPieces);
    };
    if constexpr (kPieces == 1) fetch_ahead(0);
    const auto add = [&](int (&sum)[4], const std::uint32_t(&a)[4], std::uint32_t b0, std::uint32_t b1, bool first_one) {
      if (decltype(fresh)::value && first_one) mma_int8(sum, a, b0, b1, start);
      else mma_int8(sum, a, b0, b1, sum);
    };
    if constexpr (Shape::kFolded) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const std::uint32_t b0 = permute(b[0][j], 0u, fold), b1 = permute(b[0][j], 0u, fold + (p < 4 ? 0x0022u : 0x2200u));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::uint32_t even[2], odd[2];
          lookup.pairs(now, 2 * i, j, even);
          lookup.pairs(now, 2 * i + 1, j, odd);
          add(sums[0][0][0][i], {even[0], odd[0], even[1], odd[1]}, b0, b1, j == 0);
        }
        if (j % 2 == 1) fetch_ahead(j / 2);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords / 2; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::uint32_t even[kPlanes][2], odd[kPlanes][2];
          lookup.quads(now, 2 * i, j, even);
          lookup.quads(now, 2 * i + 1, j, odd);
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const std::uint32_t a[4] = {even[plane][0], odd[plane][0], even[plane][1], odd[plane][1]};
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
              for (int set = 0; set < kSets; ++set) {
                add(sums[set][tile][plane][i], a, b[tile][2 * j] & mask[set], b[tile][2 * j + 1] & mask[set], j == 0);
              }
            }
          }
        }
        if constexpr (kPieces == 2) fetch_ahead(j);
      }
    }
  };

  float totals[kTiles][Shape::kRows][Shape::kColumns] = {};
  [[maybe_unused]] float* exchange =
      reinterpret_cast<float*>(shared_memory() + Shared::kTable) + (thread_index() >> 5) * 2 * Shared::kValues;
  [[maybe_unused]] int place = 0;
  const auto finish = [&] {  // adds the sums of a turn to the totals
    if constexpr (!Shape::kOne) {  // every lane prepares the parameters of one row, and needs those of four
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        float own_values[kSlots];
        params.values(words[set], 0, own_values);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) exchange[place + (set * kSlots + slot) * kPanel + lane] = own_values[slot];
      }
      warp_barrier();
    }
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      float values[kSlots][4];
      if constexpr (Shape::kOne) {
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
          float of_row[kSlots];
          params.values(words[set], row, of_row);
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) values[slot][row] = of_row[slot];
        }
      } else {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          const float4 v = *reinterpret_cast<const float4*>(exchange + place + (set * kSlots + slot) * kPanel + 4 * p);
          values[slot][0] = v.x, values[slot][1] = v.y, values[slot][2] = v.z, values[slot][3] = v.w;
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int row = 0; row < Shape::kRows; ++row) {
#pragma unroll
          for (int column = 0; column < Shape::kColumns; ++column) {
            const Rounded& r = rounded[set][tile][column];
            float sum = r.sum * values[Shape::kSums][row];
#pragma unroll
            for (int plane = 0; plane < Shape::kSums; ++plane) {
              const int dot = Shape::pick(sums[set][tile][plane], q, row, column);
              sum = fused(float_of(static_cast<std::uint32_t>(dot)) - kMagicFloat, values[plane][row], sum);
            }
            totals[tile][row][column] = fused(sum, r.scale, totals[tile][row][column]);
          }
        }
      }
    }
    place ^= Shared::kValues;  // what the next turn writes, no lane still reads
  };
  for (int turn = first; turn < last; ++turn) {
    multiply(std::true_type{});
    // A turn of groups of 128 and more is two steps: half as many conversions a weight, and sums of 128 products still
    // fit 22 bits.
    if (span == 2) multiply(std::false_type{});
    finish();
    if (turn + 1 < last) fetch();
  }
  barrier();  // the table is read no more: its memory takes the sums
  auto* partial = reinterpret_cast<float*>(shared_memory()) + (thread_index() >> 5) * kTokens * kPanel;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
#pragma unroll
      for (int column = 0; column < Shape::kColumns; ++column) {
        float total = totals[tile][row][column];
        if constexpr (Shape::kHalves) total += shuffle_xor(total, 2);
        const int first_row = Shape::kOne ? Shape::row(p, q) : 4 * p;
        partial[(Shape::kOne ? 0 : 8 * tile + 2 * q + column) * kPanel + first_row + row] = total;
      }
    }
  }
  barrier();
  reduce_and_store<AnyType>(arguments.k, AllTokens{arguments.k.m.tokens}, reinterpret_cast<float*>(shared_memory()), panel, kTokens);
}

}  // namespace rankbook::cuda
