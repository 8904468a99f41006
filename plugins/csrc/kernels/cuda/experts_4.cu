// Kernels for products of experts and codes of 4 bits.
#include "kernels/cuda/experts_launch.cuh"

namespace rankbook::cuda {
RB_DEFINE_EXPERTS(4)
}  // namespace rankbook::cuda
