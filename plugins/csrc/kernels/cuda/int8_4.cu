// Kernels for rounded activations and codes of 4 bits.
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_INT8(4)
}  // namespace rankbook::cuda
