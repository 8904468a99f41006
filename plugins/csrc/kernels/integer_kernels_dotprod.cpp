#define RANKBOOK_NEON
#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& dotprod_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
