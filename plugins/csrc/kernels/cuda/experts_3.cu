// Kernels for products of experts and codes of 3 bits.
#include "kernels/cuda/experts_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_EXPERTS(3)
}  // namespace rankbook::cuda
