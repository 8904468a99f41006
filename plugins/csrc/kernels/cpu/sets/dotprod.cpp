// Dot products of bytes in NEON (ARMv8.2).
#define RANKBOOK_NEON

#include "kernels/cpu/int8/kernels.h"

namespace rankbook {

const KernelSet kDotProdSet = {nullptr, &int8_loops::kKernels, nullptr, nullptr, nullptr};

}  // namespace rankbook
