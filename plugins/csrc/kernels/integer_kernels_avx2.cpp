#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& avx2_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
