// Tiles of bytes beside AVX-512 (Sapphire Rapids and later).
#include "kernels/cpu/int8/kernels.h"

namespace rankbook {

const KernelSet kAmxSet = {nullptr, &int8_loops::kKernels, nullptr, nullptr, nullptr};

}  // namespace rankbook
