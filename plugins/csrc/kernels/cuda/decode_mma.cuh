// The product for few tokens and 16-bit activations: codes become weights in registers and go straight to tensor cores.
//
// Weights are the A operand of mma.m16n8k16 and tokens the eight columns of B, as in QTIP (Tseng et al. 2024): one
// instruction serves up to eight tokens at the price of one. The order of inputs inside an mma step is free as long as
// both operands share it, so every lane multiplies its own chunk of its own rows with the same chunk of x and no data
// moves between lanes. Fragment rows p and p + 8 are the neighbouring output rows 4 p + 2 i and 4 p + 2 i + 1.
//
// Rows must be multiples of 8 inputs, so that x is read 16 bytes at a time, and groups must not end inside a unit;
// others take the way of many tokens.
#pragma once

#include "kernels/cuda/branch.cuh"
#include "kernels/cuda/lookup.cuh"

namespace rankbook::cuda {

// 2 kPairs neighbouring activations from `from` on, two per word; zero from the input `left` on.
// x is read from global memory, not staged: the warps of a block work on different columns, so nothing would be shared,
// and neighbouring blocks find the lines in the second-level cache.
template <int kPairs>
RB_DEVICE void load_activations(const uint4* from, int left, bool whole, std::uint32_t (&out)[kPairs]) {
  uint4 v[kPairs / 4];
  if (whole) {  // the same for all lanes
#pragma unroll
    for (int j = 0; j < kPairs / 4; ++j) v[j] = load(from + j);
  } else {
#pragma unroll
    for (int j = 0; j < kPairs / 4; ++j) {
      v[j] = {0u, 0u, 0u, 0u};
      if (8 * j < left) v[j] = load(from + j);
    }
  }
#pragma unroll
  for (int j = 0; j < kPairs / 4; ++j) {
    out[4 * j] = v[j].x, out[4 * j + 1] = v[j].y, out[4 * j + 2] = v[j].z, out[4 * j + 3] = v[j].w;
  }
}

// What turns stored parameters into coefficients (one slot per plane) and offset (the last slot), for one panel. Absent
// slots read another plane and multiply it by zero.
// Stored as (N/32, G, Q, 32): a lane's four rows of one plane are one word, and a warp reads 32 bytes a plane and
// group.
template <int kPlanes>
struct PanelParams {
  static constexpr int kSlots = kPlanes + 1;
  using Words = std::uint32_t[kSlots];  // parameters of four rows each, as stored

  const std::int8_t* codes;  // of the lane's first row in the first group
  int pitch;                 // from group to group
  int last;                  // from the first plane to the offset
  float step[kSlots], base[kSlots];

  static RB_DEVICE bool exists(const PackedWeight& w, int slot) {
    return slot == kPlanes ? w.has_offset : slot < w.planes();
  }

  RB_DEVICE int at(const PackedWeight& w, int slot) const {
    if (slot == kPlanes) return last;
    return slot < kPlanes - 1 || kPlanes < 4 || exists(w, slot) ? kPanel * slot : 0;  // 4 stands for 3 planes as well
  }

  // Coefficients are multiplied by what levels are divided by.
  // `step` and `base` are per panel and plane: read once, they turn a parameter into its value by one multiply-add.
  RB_DEVICE void prepare(const PackedWeight& w, int panel, const float (&scales)[kPlanes]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      step[slot] = base[slot] = 0.0f;
      if (!exists(w, slot)) continue;
      const float scale = slot < kPlanes ? scales[slot % kPlanes] : 1.0f;
      const std::size_t plane = static_cast<std::size_t>(panel) * w.params_planes + at(w, slot) / kPanel;
      step[slot] = (w.step_full ? 1.0f : read_float(w.step, plane)) * scale;
      base[slot] = load(w.base + (w.base_full ? plane : 0)) * scale;
      if (common(w)) base[slot] -= kByteFloat * step[slot];
    }
  }

  // A byte u in the bits of a float, as 2^15 + u: cheaper than a conversion, and what it costs in accuracy (2^-24 of
  // 2^15 steps) is far below fp16.
  static constexpr float kByteFloat = 32768.0f + 128.0f;  // of a code of zero
  static RB_DEVICE float byte_float(std::uint32_t bytes, int i) {
    return float_of(permute(bytes, 0x47000000u, 0x7404u + 16u * static_cast<unsigned>(i)));
  }

  RB_DEVICE PanelParams(const PackedWeight& w, int panel, int row) {
    pitch = w.params_planes * kPanel;
    codes = w.params + static_cast<std::size_t>(panel) * w.groups * pitch + row;
    last = w.has_offset ? kPanel * (w.params_planes - 1) : 0;
  }

  // The common form: a byte per parameter, a step per plane. It alone is fetched ahead.
  // Fetching ahead hides the latency of a group's parameters behind the products of the group before it; the other
  // forms, fp16 and fp32 parameters, are read when they are needed.
  static RB_DEVICE bool common(const PackedWeight& w) { return w.params_full && !w.step_full; }

  RB_DEVICE void fetch(const PackedWeight& w, int group, Words& words) const {
    const std::int8_t* from = codes + static_cast<std::size_t>(static_cast<unsigned>(group * pitch));
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      words[slot] = load(reinterpret_cast<const std::uint32_t*>(from + at(w, slot)));
    }
  }

  RB_DEVICE GroupNumbers<kPlanes> numbers(const Words& words) const {
    GroupNumbers<kPlanes> out;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const std::uint32_t bytes = words[slot] ^ 0x80808080u;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = byte_float(bytes, i) * step[slot] + base[slot];
      out.pairs[0][slot] = pack_half(values[0], values[1]);
      out.pairs[1][slot] = pack_half(values[2], values[3]);
    }
    return out;
  }

  // The other forms.
  RB_DEVICE GroupNumbers<kPlanes> numbers(const PackedWeight& w, int panel, int group, int row) const {
    GroupNumbers<kPlanes> out;
    const std::size_t first = (static_cast<std::size_t>(panel) * w.groups + group) * pitch + row;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::size_t where = first + at(w, slot) + i;
        const float code = static_cast<float>(load(w.params + (w.params_full ? where : 0)));
        values[i] = code * (w.step_full ? read_float(w.step, where) * step[slot] : step[slot]) + base[slot];
      }
      out.pairs[0][slot] = pack_half(values[0], values[1]);
      out.pairs[1][slot] = pack_half(values[2], values[3]);
    }
    return out;
  }
};

// How a row of groups falls into the steps of a warp. A step that several groups share costs parameters anew in every
// step.
// A step is 64 columns (128 with 3 bits). Groups of 64 and 128 cost their parameters once; groups of 32 leave each pair
// of lanes with a group of its own, which costs no more instructions.
template <int kBits>
struct Steps {
  static constexpr int kColumns = 4 * Chunk<kBits>::kColumns;  // of a step: four lanes take a chunk each

  int count, span, groups;
  unsigned per_column;  // groups per column, times 2^32

  RB_DEVICE explicit Steps(const PackedWeight& w) {
    const int size = w.columns / w.groups;
    count = (w.columns + kColumns - 1) / kColumns;
    span = w.groups == 1 ? count : (size % kColumns == 0 ? size / kColumns : 1);
    groups = w.groups;
    per_column = 0xffffffffu / static_cast<unsigned>(size) + 1u;
  }

  // Group of the lane's columns; columns past the end belong to the last group. The product is exact below 2^20 columns
  // and groups of up to 2^12; a single group is more, and the last.
  // A division by multiplication: 32-bit integer division is some twenty instructions on a GPU.
  RB_DEVICE int group(int step, int q) const {
    const unsigned column = static_cast<unsigned>((4 * step + q) * Chunk<kBits>::kColumns);
    const int found = static_cast<int>(multiply_high(column, per_column));
    return found < groups ? found : groups - 1;
  }
};

// What a warp reads of a panel for steps `step` to `last`: codes a step ahead of the products, parameters a group ahead.
template <int kBits, int kPlanes>
struct PanelReader {
  using U = Unit<kBits>;
  using C = Chunk<kBits>;

  int panel, p, q, chunks, chunk;  // the lane's chunk of the step
  const uint4* codes;
  C ahead = {};
  PanelParams<kPlanes> params;
  typename PanelParams<kPlanes>::Words words = {};
  bool common;
  int group;

  // Lanes without columns keep what they have: every byte is a valid code, and their activations are zero.
  RB_DEVICE PanelReader(const PackedWeight& w, const Steps<kBits>& steps, int panel_, int step, int last)
      : panel(panel_), p((thread_index() & 31) >> 2), q(thread_index() & 3), params(w, panel_, 4 * p), common(params.common(w)) {
    const int units = U::count(w.columns);
    chunks = units / U::kChunk, chunk = 4 * step + q;
    const auto* of_panel = reinterpret_cast<const uint4*>(w.codes + static_cast<std::size_t>(panel) * units * U::kWords * kPanel);
    prefetch_codes<kBits>(of_panel, 4 * step, 4 * last < chunks ? 4 * last : chunks);
    codes = of_panel + static_cast<std::size_t>(chunk) * C::kPitch + p;
    if (step < last && chunk < chunks) ahead.load_from(codes);
    fetch_group(w, steps.group(step, q));
  }

  RB_DEVICE void fetch_group(const PackedWeight& w, int next) {
    group = next;
    if (common) params.fetch(w, group, words);
  }

  RB_DEVICE GroupNumbers<kPlanes> numbers(const PackedWeight& w) const {
    return common ? params.numbers(words) : params.numbers(w, panel, group, 4 * p);
  }

  // The codes of a step; those of the next one, if there is one, are asked for.
  RB_DEVICE C next_codes(bool more) {
    const C now = ahead;
    codes += 4 * C::kPitch;
    chunk += 4;
    if (more && chunk < chunks) ahead.load_from(codes);
    return now;
  }
};

// Table and sums share their memory: the table is not needed once the products are done.
template <int kBits, int kPlanes, typename T>
struct DecodeShared {
  using Lookup = typename LookupOf<T, kBits, kPlanes>::Type;
  static constexpr std::size_t bytes(int tiles) {
    const std::size_t sums = sizeof(float) * kWarps * 8 * tiles * kPanel;
    if constexpr (Lookup::kBytes == 0) return sums;
    else return sums < Lookup::kBytes ? Lookup::kBytes : sums;
  }
};

// y for up to 8 kTiles tokens. Blocks (x: panel, y: share of the columns); the warps of a block share its columns.
// No split of rows within a block: eight warps on one panel keep the sums of a block small (1 KB a token and warp tile)
// and the table shared, and a layer of 4,096 rows still has 128 blocks.
template <int kBits, int kPlanes, int kTiles, typename T, bool kShared = true, typename Tokens>
RB_DEVICE void multiply_panel_mma(const MatmulKernel& arguments, const Tokens& tokens) {
  using C = Chunk<kBits>;
  const Matmul& m = arguments.m;
  const PackedWeight& w = m.weight;
  let_next_start();
  const int lane = thread_index() & 31, warp = (kShared ? block_y() * kWarps : 0) + (thread_index() >> 5), panel = block_x();
  const int p = lane >> 2, q = lane & 3;

  const Steps<kBits> steps(w);
  const int warps = kShared ? grid_y() * kWarps : kWarps, share = (steps.count + warps - 1) / warps;
  int step = warp * share;
  const int last = step + share < steps.count ? step + share : steps.count;
  // The first codes and parameters are on their way while the table is made.
  PanelReader<kBits, kPlanes> reader(w, steps, panel, step, last);

  float scales[kPlanes];
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
    scales[plane] = plane < w.planes() ? plane_scale<kBits>(w, plane) : 1.0f;  // the same branch in all lanes
  }
  reader.params.prepare(w, panel, scales);
  typename LookupOf<T, kBits, kPlanes>::Type lookup;
  lookup.prepare(w, scales, shared_memory());
  barrier();

  const uint4* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = 8 * tile + p;  // columns of B do not mix: an absent token may hold whatever another one holds
    x[tile] = reinterpret_cast<const uint4*>(
        static_cast<const std::uint16_t*>(m.x) +
        static_cast<std::size_t>(tokens.at(token < tokens.count ? token : tokens.count - 1)) * w.columns + reader.chunk * C::kColumns);
  }
  int left = w.columns - reader.chunk * C::kColumns;                    // inputs from the lane's chunk on
  int warp_left = w.columns - (reader.chunk - q + 4) * C::kColumns;     // inputs behind the warp's step
  float sums[2][kTiles][4] = {};
  int end = step / steps.span * steps.span;
  while (step < last) {
    lookup.set_group(reader.numbers(w));
    end = end + steps.span < last ? end + steps.span : last;
    reader.fetch_group(w, steps.group(end, q));
    for (; step < end; ++step) {
      const C now = reader.next_codes(step + 1 < last);
      std::uint32_t b[kTiles][C::kColumns / 2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load_activations<C::kColumns / 2>(x[tile], left, warp_left >= 0, b[tile]);
        x[tile] += 4 * (C::kColumns / 8);
        lookup.arrange(b[tile]);
      }
      left -= Steps<kBits>::kColumns;
      warp_left -= Steps<kBits>::kColumns;
#pragma unroll
      for (int j = 0; j < C::kColumns / 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::uint32_t a[4];
          lookup.fragment(now, i, j, a);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            T::mma(sums[i][tile], a, b[tile][lookup.first_word(j)], b[tile][lookup.second_word(j)]);
          }
        }
      }
    }
  }
  barrier();  // the table is read no more: its memory takes the sums
  auto* partial = reinterpret_cast<float*>(shared_memory()) + (thread_index() >> 5) * 8 * kTiles * kPanel;
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
  reduce_and_store<T, kShared>(arguments, tokens, reinterpret_cast<float*>(shared_memory()), panel, 8 * kTiles);
}

// Four planes and sixteen tokens need more registers than two blocks a multiprocessor leave; so do 3 bits with two planes.
// The bound is the second argument of __launch_bounds__: 2 blocks of 256 threads allow 128 registers a thread. Where
// nvcc needs fewer a third block fits, which `Residency` finds out.
template <int kBits, int kPlanes, int kTiles, typename T>
RB_KERNEL((kTiles < 2 || (kBits != 3 && kPlanes < 3)) ? 2 : 1) decode_mma(MatmulKernel arguments) {
  multiply_panel_mma<kBits, kPlanes, kTiles, T>(arguments, AllTokens{arguments.m.tokens});
}

}  // namespace rankbook::cuda
