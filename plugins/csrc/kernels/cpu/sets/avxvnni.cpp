// Dot products of bytes in vectors of AVX2 (Alder Lake and its like, which have no AVX-512).
#include "kernels/cpu/int8/kernels.h"

namespace rankbook {

const KernelSet kAvxVnniSet = {nullptr, &int8_loops::kKernels, nullptr, nullptr, nullptr};

}  // namespace rankbook
