#include "kernels/row_kernels.h"

namespace rankbook {

const RowKernels& avx2_row_kernels() { return kRowKernels; }

}  // namespace rankbook
