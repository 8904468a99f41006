// Kernels for 4-bit codes.
#include "kernels/cuda/dispatch.cuh"

namespace rankbook::cuda {
RB_DEFINE_WIDTH(4)
}  // namespace rankbook::cuda
