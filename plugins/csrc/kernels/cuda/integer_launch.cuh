// Choice of kernels for rounded activations. Instantiated in one source file per width (int8_<bits>.cu).
#pragma once

#include "kernels/cuda/decode_int8.cuh"

namespace rankbook::cuda {

template <int kBits, int kPlanes, int kTokens, int kParts>
Status launch_int8(const IntegerKernel& k, dim3 grid, void* stream) {
  return launch(decode_int8<kBits, kPlanes, kTokens, kParts>, grid, Int8Shared<kBits, kPlanes, kTokens, kParts>::kBytes,
                stream, k);
}

// `integer_plan` admits more than 2 planes only where there is a kernel for them.
template <int kBits, int kPlanes>
Status launch_int8(const IntegerKernel& k, dim3 grid, void* stream) {
  const bool halves = k.plan.parts == 2;
  if (k.plan.slots == 1) {
    return halves ? launch_int8<kBits, kPlanes, 1, 2>(k, grid, stream) : launch_int8<kBits, kPlanes, 1, 1>(k, grid, stream);
  }
  if constexpr (kPlanes <= 2) {
    if (k.plan.slots == 16) {
      return halves ? launch_int8<kBits, kPlanes, 16, 2>(k, grid, stream) : launch_int8<kBits, kPlanes, 16, 1>(k, grid, stream);
    }
    if (halves) return launch_int8<kBits, kPlanes, 8, 2>(k, grid, stream);
  }
  return launch_int8<kBits, kPlanes, 8, 1>(k, grid, stream);
}

template <int kBits>
struct Int8Entry {
  static Status decode(const IntegerKernel& k, int blocks, void* stream);
};

#define RB_DEFINE_INT8(bits)                                                                     \
  template <int kBits>                                                                           \
  Status Int8Entry<kBits>::decode(const IntegerKernel& k, int blocks, void* stream) {            \
    const dim3 grid(ceil_div(k.k.m.weight.rows, kPanel), blocks);                                \
    switch (k.k.m.weight.planes()) {                                                             \
      case 1: return launch_int8<kBits, 1>(k, grid, stream);                                     \
      case 2: return launch_int8<kBits, 2>(k, grid, stream);                                     \
      default: return launch_int8<kBits, 4>(k, grid, stream);                                    \
    }                                                                                            \
  }                                                                                              \
  template struct Int8Entry<bits>;

}  // namespace rankbook::cuda
