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

// The most blocks that share the columns of a tile of many tokens. A bound that depends on sizes only, as `most_shares`:
// 384 blocks fill any GPU, and their sums take 25 MB.
inline int most_tile_shares(const Matmul& m, int tokens) {
  const int tiles = ceil_div(ceil_div(m.weight.rows, kPanel), kWarps) * ceil_div(tokens, 64), shares = 384 / tiles;
  return shares < 1 ? 1 : (shares < 8 ? shares : 8);
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
    const int shares = panel_shares(k.m, steps, slots);
    if (shares > 1 && k.m.rank == 0) {  // with a branch, its first kernel has done it
      const std::size_t counters = sizeof(unsigned) * ceil_div(k.m.weight.rows, kPanel);
      if (const Status status = clear(k.arrivals, counters, stream); !status.ok()) return status;
    }
    return launch(kernel, dim3(ceil_div(k.m.weight.rows, kPanel), shares), bytes, stream, k);
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

  // Between 17 tokens and some hundreds, blocks of 256 rows leave most multiprocessors idle: 16 blocks for 4,096 rows. Then
  // blocks share the columns. What adding up costs: a launch and, with 64 tokens and 8 shares, 17 MB through the second-level
  // cache, as long as six steps of a block.
  template <typename T>
  static Status prefill_16(const MatmulKernel& k, void* stream) {
    using Tile = PrefillTile<T, kBits, kPlanes>;
    static Residency resident;
    const auto kernel = prefill_mma<kBits, kPlanes, T>;
    const int rows = k.m.weight.rows, across = ceil_div(ceil_div(rows, kPanel), kWarps), tiles = ceil_div(k.m.tokens, Tile::kTokens);
    const int shares = best_shares(across * tiles, ceil_div(k.m.weight.columns, Steps<kBits>::kColumns),
                                   most_tile_shares(k.m, k.m.tokens), resident.blocks(kernel, Tile::kBytes), 2, 6);
    const Status status = launch(kernel, dim3(across, tiles * shares), Tile::kBytes, stream, k);
    if (shares == 1 || !status.ok()) return status;
    return launch(add_shares<T>, dim3(ceil_div(rows, 4 * 32), ceil_div(k.m.tokens, kWarps)), 0, stream, ShareKernel{k, shares});
  }

  static Status prefill(const MatmulKernel& k, void* stream) {
    return k.m.type == DataType::kFloat16 ? prefill_16<Half>(k, stream) : prefill_16<BFloat>(k, stream);
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
  static Status prefill(const MatmulKernel& k, void* stream);  // 1 or 2 planes
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
  Status WidthEntry<kBits>::prefill(const MatmulKernel& k, void* stream) {                           \
    return k.m.weight.planes() == 1 ? Width<kBits, 1>::prefill(k, stream) : Width<kBits, 2>::prefill(k, stream); \
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
