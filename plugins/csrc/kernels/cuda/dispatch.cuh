// Choice of kernels for one code width. Instantiated in one source file per width, so that they compile in parallel.
#pragma once

#include "kernels/cuda/decode_float.cuh"
#include "kernels/cuda/decode_mma.cuh"
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/prefill_mma.cuh"

namespace rankbook::cuda {

inline std::size_t element_size(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

// Kernels of one width for kPlanes planes (fewer are padded with zeros).
template <int kBits, int kPlanes>
struct Width {
  template <int kTokens>
  static Status decode_fp32(const MatmulKernel& k, dim3 grid, void* stream) {
    const std::size_t table = FloatDecoder<kBits, kPlanes>::kTableBytes;
    const std::size_t sums = sizeof(float) * kWarps * kTokens * kPanel;
    return launch(decode_float<kBits, kPlanes, kTokens>, grid, table > sums ? table : sums, stream, k);
  }

  template <typename T, int kTiles>
  static Status decode_16(const MatmulKernel& k, dim3 grid, void* stream) {
    return launch(decode_mma<kBits, kPlanes, kTiles, T>, grid, DecodeShared<kBits, kPlanes, T>::bytes(kTiles), stream, k);
  }

  template <typename T>
  static Status dense(const DenseKernel& k, int panels, void* stream) {
    const int steps = ceil_div(k.w.columns, 4 * Unit<kBits>::kColumns);
    const int shares = ceil_div(steps, 4 * kWarps);  // about four steps a warp
    return launch(decode_dense<kBits, kPlanes, T>, dim3(panels, shares < 64 ? shares : 64),
                  FloatDecoder<kBits, kPlanes>::kTableBytes, stream, k);
  }

  static Status any_dense(const DenseKernel& k, DataType type, void* stream) {
    const int panels = ceil_div(k.w.rows, kPanel);
    if (type == DataType::kFloat32) return dense<Float>(k, panels, stream);
    return type == DataType::kFloat16 ? dense<Half>(k, panels, stream) : dense<BFloat>(k, panels, stream);
  }

  static Status decode(const MatmulKernel& k, int blocks, void* stream) {
    const dim3 grid(ceil_div(k.m.weight.rows, kPanel), blocks);
    const int tokens = k.m.tokens;
    if (k.m.type == DataType::kFloat32) {
      if (tokens == 1) return decode_fp32<1>(k, grid, stream);
      return tokens <= 4 ? decode_fp32<4>(k, grid, stream)
                         : decode_fp32<most_float_tokens(kBits, kPlanes)>(k, grid, stream);
    }
    if (k.m.type == DataType::kFloat16) {
      return tokens <= 8 ? decode_16<Half, 1>(k, grid, stream) : decode_16<Half, 2>(k, grid, stream);
    }
    return tokens <= 8 ? decode_16<BFloat, 1>(k, grid, stream) : decode_16<BFloat, 2>(k, grid, stream);
  }

  template <typename T>
  static Status prefill_16(const MatmulKernel& k, void* stream) {
    using Tile = PrefillTile<T, kBits, kPlanes>;
    const dim3 grid(ceil_div(ceil_div(k.m.weight.rows, kPanel), kWarps), ceil_div(k.m.tokens, Tile::kTokens));
    return launch(prefill_mma<kBits, kPlanes, T>, grid, Tile::kBytes, stream, k);
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
template <int kBits>
struct WidthEntry {
  static Status decode(const MatmulKernel& k, int blocks, void* stream);
  static Status prefill(const MatmulKernel& k, void* stream);  // 1 or 2 planes
  static Status dense(const DenseKernel& k, DataType type, void* stream);
  static Status gather(const Gather& g, void* stream);
};

#define RB_BY_PLANES(planes, call)                          \
  ((planes) == 1 ? Width<kBits, 1>::call                    \
                 : (planes) == 2 ? Width<kBits, 2>::call : Width<kBits, 4>::call)

#define RB_DEFINE_WIDTH(bits)                                                                        \
  template <int kBits>                                                                               \
  Status WidthEntry<kBits>::decode(const MatmulKernel& k, int blocks, void* stream) {                \
    return RB_BY_PLANES(k.m.weight.planes(), decode(k, blocks, stream));                             \
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
