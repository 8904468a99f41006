// AVX-512 F, BW and VL. Its first processors have no dot products of bytes: avx512vnni.cpp.
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/groups/kernels.h"
#include "kernels/cpu/packed/kernels.h"
#include "kernels/cpu/rows/kernels.h"

namespace rankbook {

const KernelSet kAvx512Set = {&packed_loops::kKernels, nullptr, &attention_loops::kKernels,
                              &row_loops::kKernels, &group_loops::kKernels};

}  // namespace rankbook
