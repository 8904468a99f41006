// Choice of kernels for products of experts. Instantiated in one source file per width (experts_<bits>.cu).
//
// Called by launch.cu; as dispatch.cuh for the products of one layer. To keep the compile time small there are kernels for
// fp16 and bf16 with one and two planes of 2, 3 and 4 bits, and one of each width for everything else: 8-bit experts are
// rare, and one token of them takes fp32 about as long as the memory.
#pragma once

#include "kernels/cuda/experts.cuh"

namespace rankbook::cuda {

template <int kBits>
struct ExpertsEntry {
  static constexpr bool kTensorCores = kBits != 8;  // with 1 or 2 planes, in fp16 and bf16
  static Status few(const ExpertKernel& k, void* stream);
  static Status many(const ExpertKernel& k, void* stream);
  static Status any(const ExpertKernel& k, void* stream);
};

template <int kBits, int kPlanes, typename T>
Status launch_few(const ExpertKernel& k, void* stream) {
  const Matmul& m = k.k.m;
  return launch(experts_mma<kBits, kPlanes, T>, dim3(ceil_div(m.weight.rows, kPanel), m.tokens),
                DecodeShared<kBits, kPlanes, T>::bytes(1) + list_bytes(kExpertTokens), stream, k);
}

template <int kBits, int kPlanes, typename T>
Status launch_many(const ExpertKernel& k, void* stream) {
  const Matmul& m = k.k.m;
  return launch(experts_tile_mma<kBits, kPlanes, T>,
                dim3(ceil_div(ceil_div(m.weight.rows, kPanel), kWarps), expert_tiles(m.tokens, m.experts)),
                PrefillTile<T, kBits, kPlanes>::kBytes + list_bytes(kTileTokens), stream, k);
}

// y of the grids of kernels that take eight tokens a block.
inline int eights(const ExpertKernel& k) {
  const Matmul& m = k.k.m;
  return k.tiles == nullptr ? m.tokens : kTileTokens / kExpertTokens * expert_tiles(m.tokens, m.experts);
}

template <int kBits>
Status launch_any(const ExpertKernel& k, void* stream) {
  return launch(experts_float<kBits>, dim3(ceil_div(k.k.m.weight.rows, kPanel), eights(k)),
                experts_float_bytes<kBits>() + list_bytes(kExpertTokens), stream, k);
}

#define RB_BY_FORM(call)                                                                                              \
  const bool half = k.k.m.type == DataType::kFloat16;                                                                \
  if (k.k.m.weight.planes() == 1) return half ? call<kBits, 1, Half>(k, stream) : call<kBits, 1, BFloat>(k, stream); \
  return half ? call<kBits, 2, Half>(k, stream) : call<kBits, 2, BFloat>(k, stream)

#define RB_DEFINE_EXPERTS(bits)                                           \
  template <int kBits>                                                    \
  Status ExpertsEntry<kBits>::few(const ExpertKernel& k, void* stream) {  \
    if constexpr (!kTensorCores) return any(k, stream);                   \
    else { RB_BY_FORM(launch_few); }                                      \
  }                                                                       \
  template <int kBits>                                                    \
  Status ExpertsEntry<kBits>::many(const ExpertKernel& k, void* stream) { \
    if constexpr (!kTensorCores) return any(k, stream);                   \
    else { RB_BY_FORM(launch_many); }                                     \
  }                                                                       \
  template <int kBits>                                                    \
  Status ExpertsEntry<kBits>::any(const ExpertKernel& k, void* stream) {  \
    return launch_any<kBits>(k, stream);                                  \
  }                                                                       \
  template struct ExpertsEntry<bits>;

}  // namespace rankbook::cuda
