#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& avx512_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
