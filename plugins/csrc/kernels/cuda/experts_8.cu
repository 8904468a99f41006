// Kernels for products of experts and codes of 8 bits.
#include "kernels/cuda/experts_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_EXPERTS(8)
}  // namespace rankbook::cuda
