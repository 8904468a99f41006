// Activations rounded to 8 bits, as plugins/int8.py defines: what the integer products need besides the weight.
//
// A kernel of its own rounds x per token and group and leaves in the workspace: the int8 numbers in the order in which
// the products take them, a scale and a sum for every token and *piece* (a group, or a part of one whose integer sums fit
// the 22 bits that become floats for nothing), and the levels as bytes. Dot products of one piece are exact.
#pragma once

#include "kernels/cuda/branch.cuh"

namespace rankbook::cuda {

constexpr int kInt8Tokens = 16;  // tokens up to which there are integer products
constexpr int kZeroBytes = 32;      // activations of no column

// Scale and sum of the rounded activations of one token in one piece.
struct alignas(8) Rounded {
  float scale;
  float sum;  // a whole number
};

// Levels as bytes: level = (entry + centre) * unit.
struct LevelBytes {
  std::uint32_t entries[kMaxPlanes][64];  // 2^bits bytes a plane, four to a word; zeros for planes that do not exist
  int centre[kMaxPlanes];
  float unit[kMaxPlanes];
};

// How the columns are cut. A *step* is what a warp multiplies at once: four lanes take a chunk of 16 columns (of 32 with 3
// bits) each. `parts` is 1 where a group is made of whole steps, and 2 where it is made of half ones.
struct Int8Plan {
  int step = 0;    // columns
  int parts = 0;   // groups that a step may touch; 0: neither, there is no integer product
  int span = 0;    // steps between two conversions to fp32: a *turn*
  int piece = 0;   // columns of a piece
  int turns = 0;
  int padded = 0;  // columns with those that fill the last turn
  int slots = 0;   // tokens that have a place: 1, 8 or 16

  constexpr int pieces() const { return padded / piece; }
};

inline Int8Plan int8_plan(const PackedWeight& w, int tokens) {
  Int8Plan plan;
  const int size = w.columns / w.groups;
  plan.step = w.bits == 3 ? 128 : 64;
  // The usual form of parameters only: a byte each, a step and a base for the plane.
  if (tokens > kInt8Tokens || !w.params_full || w.step_full) return plan;
  if (w.groups == 1 || size % plan.step == 0) plan.parts = 1;
  else if (size % (plan.step / 2) == 0) plan.parts = 2;
  // Parameters of the whole weight are counted in 32 bits.
  const double stored = 1.0 * ceil_div(w.rows, kPanel) * kPanel * w.groups * w.params_planes;
  if (plan.parts == 0 || stored > 4.0e9) return Int8Plan{};
  // 255 * 127 * 128 < 2^22: the largest sum of a piece of 128 columns.
  plan.span = plan.parts == 1 && w.groups > 1 && plan.step == 64 && size % 128 == 0 ? 2 : 1;
  plan.piece = plan.parts == 2 ? plan.step / 2 : plan.span * plan.step;
  plan.turns = ceil_div(w.columns, plan.span * plan.step);
  plan.padded = plan.turns * plan.span * plan.step;
  plan.slots = tokens <= 1 ? 1 : (tokens <= 8 ? 8 : 16);
  if (w.planes() > 2 && (plan.slots == 16 || (plan.slots == 8 && plan.parts == 2))) plan.parts = 0;  // out of registers
  return plan;
}

// Arguments of the kernels of an integer product. Pointers lead into the workspace.
struct Int8Kernel {
  MatmulKernel k;
  Int8Plan plan;
  std::int8_t* ordered = nullptr;  // (M, padded), chunks in the order of the products; then kZeroBytes zeros
  std::int8_t* natural = nullptr;  // (M, K), for the error branch
  Rounded* rounded = nullptr;      // (pieces, slots)
  LevelBytes* levels = nullptr;
  int team = 1;  // warps that round one group together: 1, or all of a block
};

// What rounding makes ready for each product of one x beside x itself.
struct RoundKernel {
  struct Product {
    PackedWeight weight;
    LevelBytes* levels;
    unsigned* arrivals;
  };

  Int8Kernel x;  // where the rounded activations go
  int count = 0;
  Product products[kMostProducts];
};

// One warp reads a group of 64 inputs in two loads; a row that is one group of 4,096 would keep it busy for longer than the
// product takes, so from this size on the whole block does.
constexpr int kTeamColumns = 1024;
inline int team_of(const PackedWeight& w) { return w.columns / w.groups >= kTeamColumns ? kWarps : 1; }
constexpr std::size_t kTeamBytes = sizeof(float) * kWarps;  // of shared memory

// Where column k of a chunk stands in it, so that four neighbouring bytes meet the four codes of one byte permutation.
RB_DEVICE int ordered_column(int bits, int k) {
  if (bits == 2) return 8 * (k & 1) + 4 * (k >> 3) + ((k & 7) >> 1);
  if (bits == 3) return 8 * ((k & 7) >> 1) + 4 * (k >> 4) + ((k >> 3) & 1) * 2 + (k & 1);
  return k;
}

RB_DEVICE float largest_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = shuffle_xor(value, mask);
    value = other > value || other != other ? other : value;  // a NaN stays
  }
  return value;
}

// The largest of the warps of a team; all threads of the block must come. Shared memory is free again after the next barrier.
RB_DEVICE float largest_of_team(float value, int team) {
  value = largest_of_warp(value);
  if (team == 1) return value;  // the same for the whole block
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if ((thread_index() & 31) == 0) shared[thread_index() >> 5] = value;
  barrier();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float other = shared[warp];
    value = other > value || other != other ? other : value;
  }
  return value;
}

RB_DEVICE float larger_magnitude(float a, float largest) {
  const float b = a < 0.0f ? -a : a;
  return b > largest || b != b ? b : largest;
}

// `quantize` of plugins/int8.py, once the largest magnitude is known.
struct Rounding {
  static constexpr float kTop = 127.0f, kSmallest = 7.8886090522101181e-31f;  // 2^-100
  static constexpr float kLargest = 3.402823466e+38f;
  bool usable;
  float inverse, scale;

  RB_DEVICE explicit Rounding(float largest) {
    usable = largest >= kSmallest && largest <= kLargest;
    inverse = usable ? kTop / largest : 0.0f;
    scale = usable ? largest / kTop : (largest < kSmallest ? 0.0f : float_of(0x7fc00000u));
  }
  RB_DEVICE int code(float value) const { return usable ? round_to_int(value * inverse) : 0; }
};

// Level bytes of plane `plane`, by one warp: step 2 of the definition. Whole numbers stay as they are.
template <typename Unused = void>
RB_DEVICE void write_levels(const PackedWeight& w, int plane, LevelBytes* out) {
  const int lane = thread_index() & 31, count = 1 << w.bits;
  const std::uint16_t* from = w.levels + (plane << w.bits);
  const bool exists = plane < w.planes();
  float largest = 0.0f, high = -65536.0f, low = -65536.0f;  // low: of the negated levels
  float broken = 0.0f;
  for (int i = lane; i < count && exists; i += 32) {
    const float level = half_to_float(load(from + i));
    largest = larger_magnitude(level, largest);
    high = level > high ? level : high;
    low = -level > low ? -level : low;
    if (!(largest <= 255.0f) || level != static_cast<float>(round_to_int(level))) broken = 1.0f;
  }
  largest = largest_of_warp(largest), high = largest_of_warp(high), low = largest_of_warp(low);
  const bool whole = largest_of_warp(broken) == 0.0f && high + low <= 255.0f;
  const Rounding rounding(exists ? largest : 0.0f);
  // Entries are the levels themselves where they fit a signed byte.
  const int centre = exists && whole && (high > 127.0f || low > 128.0f) ? 128 - static_cast<int>(low) : 0;
  for (int i = lane; i < count; i += 32) {
    const float level = exists ? half_to_float(load(from + i)) : 0.0f;
    const int entry = whole ? static_cast<int>(level) - centre : rounding.code(level);
    store(reinterpret_cast<std::int8_t*>(out->entries[plane]) + i, static_cast<std::int8_t>(entry));
  }
  if (lane == 0) {
    store(&out->centre[plane], centre);
    store(&out->unit[plane], whole ? 1.0f : rounding.scale);
  }
}

// Blocks (x: eight groups, or one where a block is a team, and after them one for the levels of each product; y: token).
template <typename T>
RB_KERNEL(1) round_activations(RoundKernel arguments) {
  const Int8Kernel& a = arguments.x;
  const Matmul& m = a.k.m;
  const PackedWeight& w = m.weight;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, token = block_y();
  const int chunk = a.plan.step / 4, size = w.columns / w.groups;
  const int team = a.team, group = block_x() * (kWarps / team) + warp / team, member = warp % team;
  let_next_start();
  wait_for_earlier();
  if (const int product = block_x() - (grid_x() - arguments.count); product >= 0) {
    if (token != 0) return;
#pragma unroll
    for (int i = 0; i < kMostProducts; ++i) {  // an index known only at run time would bring the arguments into memory
      if (i != product) continue;
      clear_arrivals(arguments.products[i].arrivals, arguments.products[i].weight.rows);
      if (warp < kMaxPlanes) write_levels<>(arguments.products[i].weight, warp, arguments.products[i].levels);
    }
    if (product == 0 && warp == kMaxPlanes) {
      store(a.ordered + static_cast<std::size_t>(m.tokens) * a.plan.padded + lane, static_cast<std::int8_t>(0));
    }
    return;
  }
  if (group >= w.groups) return;  // whole warps leave, of teams of one, which meet no others
  const auto* x = static_cast<const typename T::Stored*>(m.x) + static_cast<std::size_t>(token) * w.columns;
  std::int8_t* ordered = a.ordered + static_cast<std::size_t>(token) * a.plan.padded;
  const int first = group * size, last = first + size;
  float largest = 0.0f;
  for (int k = first + 32 * member + lane; k < last; k += 32 * team) largest = larger_magnitude(T::decode(load(x + k)), largest);
  const Rounding rounding(largest_of_team(largest, team));
  const int end = group == w.groups - 1 ? a.plan.padded : last;  // the last one fills the rest with zeros
  for (int piece = first + member * a.plan.piece; piece < end; piece += team * a.plan.piece) {
    int sum = 0;
    for (int k = piece + lane; k < piece + a.plan.piece; k += 32) {
      const int code = k < last ? rounding.code(T::decode(load(x + k))) : 0;
      store(ordered + k / chunk * chunk + ordered_column(w.bits, k % chunk), static_cast<std::int8_t>(code));
      if (a.natural != nullptr && k < last) {
        store(a.natural + static_cast<std::size_t>(token) * w.columns + k, static_cast<std::int8_t>(code));
      }
      sum += code;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    if (lane == 0) {
      store(a.rounded + static_cast<std::size_t>(piece / a.plan.piece) * a.plan.slots + token,
            Rounded{piece < last ? rounding.scale : 0.0f, static_cast<float>(sum)});
    }
  }
}

// u[m][r] of rounded activations: exact products of four columns at a time, scaled and added up in fp32. A block per rank
// and token, whose threads take sixteen columns each: a row of 4,096 is read at once. Factors that are not stored as int8
// are rounded here.
template <typename Unused = void>
RB_KERNEL(1) branch_down_int8(Int8Kernel a) {
  constexpr int kColumns = 16;  // pieces are multiples of it
  const Matmul& m = a.k.m;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, rank = block_x(), token = block_y();
  const int columns = m.weight.columns;
  let_next_start();
  wait_for_earlier();
  const std::int8_t* x = a.natural + static_cast<std::size_t>(token) * columns;
  float largest = 0.0f;
  for (int k = 4 * thread_index(); m.down.scale_full && k < columns; k += 4 * 32 * kWarps) {
    float down[4];
    read_factor(m.down, rank, k, columns, down);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger_magnitude(down[i], largest);
  }
  const Rounding rounding(m.down.scale_full ? largest_of_team(largest, kWarps) : 0.0f);
  const bool whole = (columns & 3) == 0;
  float sum = 0.0f;
  for (int first = kColumns * thread_index(); first < columns; first += kColumns * 32 * kWarps) {
    int dot = 0;
#pragma unroll
    for (int quad = 0; quad < kColumns; quad += 4) {
      const int k = first + quad;
      float down[4];
      read_factor(m.down, rank, k, columns, down);
      std::uint32_t word = 0;
      if (whole && k < columns) word = load_fresh(reinterpret_cast<const std::uint32_t*>(x + k));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i >= columns) continue;
        const int code = m.down.scale_full ? rounding.code(down[i]) : static_cast<int>(down[i]);
        dot += code * (whole ? static_cast<std::int8_t>(word >> (8 * i)) : load_fresh(x + k + i));
      }
    }
    const Rounded* rounded = a.rounded + static_cast<std::size_t>(first / a.plan.piece) * a.plan.slots + token;
    sum += static_cast<float>(dot) * load_fresh(&rounded->scale);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
  barrier();  // the largest is read no more: its memory takes the sums
  auto* partial = reinterpret_cast<float*>(shared_memory());
  if (lane == 0) partial[warp] = sum;
  barrier();
  if (thread_index() > 0) return;
  for (int other = 1; other < kWarps; ++other) sum += partial[other];
  store_u(m, rank, token, m.down.scale_full ? sum * rounding.scale : sum, a.k.u);
}

// x rounded and back in its own type, for products that have no int8 form. A team per group; blocks as for
// `round_activations`, without the one for the levels.
template <typename T>
RB_KERNEL(1) round_in_place(Int8Kernel a) {
  const Matmul& m = a.k.m;
  const int lane = thread_index() & 31, warp = thread_index() >> 5, token = block_y();
  const int team = a.team, group = block_x() * (kWarps / team) + warp / team, member = warp % team;
  const int size = m.weight.columns / m.weight.groups;
  if (group >= m.weight.groups) return;  // whole warps leave, of teams of one, which meet no others
  const std::size_t first = static_cast<std::size_t>(token) * m.weight.columns + static_cast<std::size_t>(group) * size;
  const auto* x = static_cast<const typename T::Stored*>(m.x) + first;
  auto* y = reinterpret_cast<typename T::Stored*>(a.ordered) + first;
  float largest = 0.0f;
  for (int k = 32 * member + lane; k < size; k += 32 * team) largest = larger_magnitude(T::decode(load(x + k)), largest);
  const Rounding rounding(largest_of_team(largest, team));
  for (int k = 32 * member + lane; k < size; k += 32 * team) {
    store(y + k, T::encode(static_cast<float>(rounding.code(T::decode(load(x + k)))) * rounding.scale));
  }
}

}  // namespace rankbook::cuda
