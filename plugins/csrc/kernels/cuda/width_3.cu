// Kernels for 3-bit codes.
#include "kernels/cuda/dispatch.cuh"

namespace rankbook::cuda {
RB_DEFINE_WIDTH(3)
}  // namespace rankbook::cuda
