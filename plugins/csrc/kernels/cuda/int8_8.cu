// Kernels for rounded activations and codes of 8 bits.
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_INT8(8)
}  // namespace rankbook::cuda
