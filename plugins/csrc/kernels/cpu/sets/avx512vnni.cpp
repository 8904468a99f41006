// Dot products and look-ups of bytes in AVX-512: VNNI and VBMI.
#include "kernels/cpu/int8/kernels.h"

namespace rankbook {

const KernelSet kAvx512VnniSet = {nullptr, &int8_loops::kKernels, nullptr, nullptr, nullptr};

}  // namespace rankbook
