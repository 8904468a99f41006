// AVX2, FMA and F16C.
#include "kernels/cpu/attention/kernels.h"
#include "kernels/cpu/groups/kernels.h"
#include "kernels/cpu/int8/kernels.h"
#include "kernels/cpu/packed/kernels.h"
#include "kernels/cpu/rows/kernels.h"

namespace rankbook {

const KernelSet kAvx2Set = {&packed_loops::kKernels, &int8_loops::kKernels, &attention_loops::kKernels,
                            &row_loops::kKernels, &group_loops::kKernels};

}  // namespace rankbook
