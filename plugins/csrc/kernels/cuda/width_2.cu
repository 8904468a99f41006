// Kernels for 2-bit codes.
#include "kernels/cuda/dispatch.cuh"

namespace rankbook::cuda {
RB_DEFINE_WIDTH(2)
}  // namespace rankbook::cuda
