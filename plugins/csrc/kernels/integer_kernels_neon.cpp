#define RANKBOOK_NEON
#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& neon_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
