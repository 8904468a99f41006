#include "kernels/row_kernels.h"

namespace rankbook {

const RowKernels& portable_row_kernels() { return kRowKernels; }

}  // namespace rankbook
