// Kernels for 8-bit codes.
#include "kernels/cuda/dispatch.cuh"

namespace rankbook::cuda {
RB_DEFINE_WIDTH(8)
}  // namespace rankbook::cuda
