// Kernels for rounded activations and codes of 3 bits.
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_INT8(3)
}  // namespace rankbook::cuda
