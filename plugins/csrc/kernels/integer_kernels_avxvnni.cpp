#include "kernels/integer_kernels.h"

namespace rankbook {

const IntegerKernels& avxvnni_integer_kernels() { return kIntegerKernels; }

}  // namespace rankbook
