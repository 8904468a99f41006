#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& portable_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
