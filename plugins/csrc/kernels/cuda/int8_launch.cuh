// Choice of kernels for rounded activations. Instantiated in one source file per width (int8_<bits>.cu).
//
// Called by launch.cu through Int8Entry once x is rounded; as dispatch.cuh for the kernels of other types.
#pragma once

#include "kernels/cuda/decode_int8.cuh"

namespace rankbook::cuda {

template <int kBits, int kPlanes, int kTokens, int kParts>
Status launch_int8(const Int8Kernel& k, void* stream) {
  constexpr std::size_t bytes = Int8Shared<kBits, kPlanes, kTokens, kParts>::kBytes;
  static Residency resident;
  const auto kernel = decode_int8<kBits, kPlanes, kTokens, kParts>;
  // Turns and not steps: a warp takes whole ones.
  const int shares = panel_shares(k.k.m, k.plan.turns, resident.blocks(kernel, bytes), 0);
  return launch(kernel, dim3(ceil_div(k.k.m.weight.rows, kPanel), shares), bytes, stream, k, Start::kEarly);
}

// `int8_plan` admits more than 2 planes only where there is a kernel for them.
// Six forms a width and number of planes: one, 8 or 16 tokens, and groups of whole or half steps. All others are
// rounded in place.
template <int kBits, int kPlanes>
Status launch_int8(const Int8Kernel& k, void* stream) {
  const bool halves = k.plan.parts == 2;
  if (k.plan.slots == 1) {
    return halves ? launch_int8<kBits, kPlanes, 1, 2>(k, stream) : launch_int8<kBits, kPlanes, 1, 1>(k, stream);
  }
  if constexpr (kPlanes <= 2) {
    if (k.plan.slots == 16) {
      return halves ? launch_int8<kBits, kPlanes, 16, 2>(k, stream) : launch_int8<kBits, kPlanes, 16, 1>(k, stream);
    }
    if (halves) return launch_int8<kBits, kPlanes, 8, 2>(k, stream);
  }
  return launch_int8<kBits, kPlanes, 8, 1>(k, stream);
}

template <int kBits>
struct Int8Entry {
  static Status decode(const Int8Kernel& k, void* stream);
};

// A macro defines the entry of one width, so that int8_<bits>.cu has one line.
#define RB_DEFINE_INT8(bits)                                               \
  template <int kBits>                                                     \
  Status Int8Entry<kBits>::decode(const Int8Kernel& k, void* stream) {     \
    switch (k.k.m.weight.planes()) {                                       \
      case 1: return launch_int8<kBits, 1>(k, stream);                     \
      case 2: return launch_int8<kBits, 2>(k, stream);                     \
      default: return launch_int8<kBits, 4>(k, stream);                    \
    }                                                                      \
  }                                                                        \
  template struct Int8Entry<bits>;

}  // namespace rankbook::cuda
