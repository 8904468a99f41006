// Kernels for products of experts and codes of 2 bits.
#include "kernels/cuda/experts_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_EXPERTS(2)
}  // namespace rankbook::cuda
