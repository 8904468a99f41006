// Kernels for rounded activations and codes of 2 bits.
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_INT8(2)
}  // namespace rankbook::cuda
