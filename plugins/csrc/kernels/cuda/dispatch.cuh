// Choice of kernels for one code width. Instantiated in one source file per width, so that they compile in parallel.
//
// Called by launch.cu through WidthEntry. Here each kernel meets its launch: grid, dynamic shared memory, and how many
// blocks share a panel on the device at hand.
//
// Planes 1, 2 and 4 are template arguments, since the inner loops are unrolled over them; types of x and tiles of
// tokens too. That is 18 to 20 kernels a width, compiled in files of their own.
#pragma once

#include "kernels/cuda/decode_float.cuh"
#include "kernels/cuda/decode_mma.cuh"
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/prefill_mma.cuh"

namespace rankbook::cuda {

inline std::size_t element_size(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

inline int prefill_across(const Matmul& m) { return ceil_div(ceil_div(m.weight.rows, kPanel), kWarps); }  // tiles of 256 rows

// The most blocks that share a tile of many tokens. A bound that depends on sizes only, as `most_shares`: their sums take
// 34 MB. The four tiles of 1,024 rows and up to 64 tokens may be 128 blocks.
inline int most_tile_shares(const Matmul& m, int tokens) {
  const int shares = 512 / (prefill_across(m) * ceil_div(tokens, 64));
  return shares < 1 ? 1 : (shares < 32 ? shares : 32);
}

// The cut of `tiles` tiles of `steps` steps that takes the least time on a device that runs `slots` blocks at once,
// counted in steps. A block's beginning in a tile costs two steps; adding up a launch, which is as long as one, and for as many
// parts of tiles of 64 tokens as there are slots what three take: 64 KB of sums each way, between the 4.8 steps of an H100 and
// the 1.0 of GPUs whose tensor cores are slower. `most`: blocks that may share a tile. Tiles are cut for themselves, or all
// evenly.
inline Split best_split(int across, int steps, int tiles, int slots, int most, int tokens) {
  Split best{across, steps, steps};
  long least = static_cast<long>(ceil_div(tiles, slots)) * (2 + steps);
  if (static_cast<long>(tiles) * (steps + 8) > INT_MAX) return best;
  const auto consider = [&](int of_tile, int own, int shares, int begins, int parts) {
    const int blocks = ceil_div(tiles * of_tile, own);
    const int live = tokens < 64 ? tokens : 64;
    const long cost = static_cast<long>(ceil_div(blocks, slots)) * (own + 2 * begins) + 1 + ceil_div(3 * live * parts, 64 * slots);
    if (shares <= most && cost < least) best.steps = of_tile, best.own = own, least = cost;
  };
  for (int shares = 2; shares <= most; ++shares) {
    const int own = ceil_div(steps, shares);
    consider(own * shares, own, shares, 1, tiles * shares);
  }
  for (int waves = 1; waves <= 4; ++waves) {
    const int own = ceil_div(tiles * steps, waves * slots), blocks = ceil_div(tiles * steps, own);
    if (own % steps != 0) consider(steps, own, (steps + own - 2) / own + 1, (own + steps - 2) / steps + 1, blocks + (blocks < tiles ? blocks : tiles));
  }
  return best;
}

// Kernels of one width for kPlanes planes (fewer are padded with zeros).
template <int kBits, int kPlanes>
struct Width {
  // Blocks for few tokens (x: panel, y: share of the columns), as many as the device runs at once.
  template <typename Kernel>
  static Status decode_with(Kernel kernel, std::size_t bytes, int slots, const MatmulKernel& k, void* stream) {
    // Of a warp, as `Steps` of decode_mma.cuh cuts the columns; decode_float has more and shorter ones, which are
    // shared alike.
    const int steps = ceil_div(k.m.weight.columns, 4 * (Unit<kBits>::kColumns < 16 ? 16 : Unit<kBits>::kColumns));
    const bool behind_branch = k.m.rank > 0;
    const dim3 branch = branch_grid(k.m);
    const int taken = behind_branch && starts_early(kernel) ? static_cast<int>(branch.x * branch.y) : 0;
    const int shares = panel_shares(k.m, steps, slots, taken);
    if (shares > 1 && !behind_branch) {  // with a branch, its first kernel has done it
      const std::size_t counters = sizeof(unsigned) * ceil_div(k.m.weight.rows, kPanel);
      if (const Status status = clear(k.arrivals, counters, stream); !status.ok()) return status;
    }
    return launch(kernel, dim3(ceil_div(k.m.weight.rows, kPanel), shares), bytes, stream, k,
                  behind_branch ? Start::kEarly : Start::kInTurn);
  }

  template <int kTokens>
  static Status decode_fp32(const MatmulKernel& k, void* stream) {
    constexpr std::size_t table = FloatDecoder<kBits, kPlanes>::kTableBytes;
    constexpr std::size_t sums = sizeof(float) * kWarps * kTokens * kPanel, bytes = table > sums ? table : sums;
    static Residency resident;
    const auto kernel = decode_float<kBits, kPlanes, kTokens>;
    return decode_with(kernel, bytes, resident.blocks(kernel, bytes), k, stream);
  }

  template <typename T, int kTiles>
  static Status decode_16(const MatmulKernel& k, void* stream) {
    constexpr std::size_t bytes = DecodeShared<kBits, kPlanes, T>::bytes(kTiles);
    static Residency resident;
    const auto kernel = decode_mma<kBits, kPlanes, kTiles, T>;
    return decode_with(kernel, bytes, resident.blocks(kernel, bytes), k, stream);
  }

  // Shares of the columns by the length of a row alone: with 64 blocks for each of 128 panels every GPU is full, and a
  // block's table is small (2^b floats a plane).
  template <typename T>
  static Status dense(const DenseKernel& k, int panels, void* stream) {
    const int steps = ceil_div(k.w.columns, 4 * Unit<kBits>::kColumns);
    const int shares = ceil_div(steps, 4 * kWarps);  // about four steps a warp
    return launch(decode_dense<kBits, kPlanes, T>, dim3(panels, shares < 64 ? shares : 64),
                  FloatDecoder<kBits, kPlanes>::kTableBytes, stream, k);
  }

  static Status any_dense(const DenseKernel& k, DataType type, void* stream) {
    const int panels = ceil_div(k.rows, kPanel);
    if (type == DataType::kFloat32) return dense<Float>(k, panels, stream);
    return type == DataType::kFloat16 ? dense<Half>(k, panels, stream) : dense<BFloat>(k, panels, stream);
  }

  // Numbers of tokens between two forms take the larger one: its columns of B are there anyway, and of fp32 sums those
  // of tokens that do not exist are skipped.
  static Status decode(const MatmulKernel& k, void* stream) {
    const int tokens = k.m.tokens;
    if (k.m.type == DataType::kFloat32) {
      if (tokens == 1) return decode_fp32<1>(k, stream);
      return tokens <= 4 ? decode_fp32<4>(k, stream) : decode_fp32<most_float_tokens(kBits, kPlanes)>(k, stream);
    }
    if (k.m.type == DataType::kFloat16) return tokens <= 8 ? decode_16<Half, 1>(k, stream) : decode_16<Half, 2>(k, stream);
    return tokens <= 8 ? decode_16<BFloat, 1>(k, stream) : decode_16<BFloat, 2>(k, stream);
  }

  // Between 17 tokens and some hundreds, tiles of 256 rows leave most multiprocessors idle: there are 16 for 4,096 rows.
  template <typename T>
  static Split split_16(const Matmul& m) {
    using Tile = PrefillTile<T, kBits, kPlanes>;
    static Residency resident;
    const int slots = resident.blocks(prefill_mma<kBits, kPlanes, T>, Tile::kBytes), across = prefill_across(m);
    return best_split(across, ceil_div(m.weight.columns, Steps<kBits>::kColumns), across * ceil_div(m.tokens, Tile::kTokens), slots,
                      most_tile_shares(m, m.tokens), m.tokens);
  }

  template <typename T>
  static Status prefill_16(const PrefillKernel& p, Start start, void* stream) {
    using Tile = PrefillTile<T, kBits, kPlanes>;
    const int tiles = p.split.across * ceil_div(p.k.m.tokens, Tile::kTokens);
    const int blocks = p.split.whole() ? tiles : ceil_div(tiles * p.split.steps, p.split.own);
    return launch(prefill_mma<kBits, kPlanes, T>, dim3(blocks), Tile::kBytes, stream, p, start);
  }

  static Split prefill_split(const Matmul& m) { return m.type == DataType::kFloat16 ? split_16<Half>(m) : split_16<BFloat>(m); }

  static Status prefill(const PrefillKernel& p, Start start, void* stream) {
    return p.k.m.type == DataType::kFloat16 ? prefill_16<Half>(p, start, stream) : prefill_16<BFloat>(p, start, stream);
  }

  static Status gather(const Gather& g, void* stream) {
    const int blocks = g.count < 65535 ? static_cast<int>(g.count) : 65535;
    return launch(gather_rows<kBits, kPlanes>, dim3(blocks), FloatDecoder<kBits, kPlanes>::kTableBytes, stream, g);
  }
};

// The entry points of one width, declared here and defined in width_<bits>.cu.
// Declarations are all that launch.cu sees: ten files compile side by side, in a third of the time of one.
template <int kBits>
struct WidthEntry {
  static Status decode(const MatmulKernel& k, void* stream);
  // Of 1 or 2 planes: how blocks share the work, and the product. Sums of tiles that several share are `add_shares`' to add.
  static Split prefill_split(const Matmul& m);
  static Status prefill(const PrefillKernel& p, Start start, void* stream);
  static Status dense(const DenseKernel& k, DataType type, void* stream);
  static Status gather(const Gather& g, void* stream);
};

// Three planes run as four with zeros, see FloatDecoder::fill_table.
#define RB_BY_PLANES(planes, call)                          \
  ((planes) == 1 ? Width<kBits, 1>::call                    \
                 : (planes) == 2 ? Width<kBits, 2>::call : Width<kBits, 4>::call)

#define RB_DEFINE_WIDTH(bits)                                                                        \
  template <int kBits>                                                                               \
  Status WidthEntry<kBits>::decode(const MatmulKernel& k, void* stream) {                \
    return RB_BY_PLANES(k.m.weight.planes(), decode(k, stream));                             \
  }                                                                                                  \
  template <int kBits>                                                                               \
  Split WidthEntry<kBits>::prefill_split(const Matmul& m) {                                           \
    return m.weight.planes() == 1 ? Width<kBits, 1>::prefill_split(m) : Width<kBits, 2>::prefill_split(m); \
  }                                                                                                  \
  template <int kBits>                                                                               \
  Status WidthEntry<kBits>::prefill(const PrefillKernel& p, Start start, void* stream) {             \
    return p.k.m.weight.planes() == 1 ? Width<kBits, 1>::prefill(p, start, stream)                   \
                                      : Width<kBits, 2>::prefill(p, start, stream);                  \
  }                                                                                                  \
  template <int kBits>                                                                               \
  Status WidthEntry<kBits>::dense(const DenseKernel& k, DataType type, void* stream) {               \
    return RB_BY_PLANES(k.w.planes(), any_dense(k, type, stream));                                   \
  }                                                                                                  \
  template <int kBits>                                                                               \
  Status WidthEntry<kBits>::gather(const Gather& g, void* stream) {                                  \
    return RB_BY_PLANES(g.weight.planes(), gather(g, stream));                                       \
  }                                                                                                  \
  template struct WidthEntry<bits>;

}  // namespace rankbook::cuda
