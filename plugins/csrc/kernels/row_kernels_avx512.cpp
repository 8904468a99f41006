#include "kernels/row_kernels.h"

namespace rankbook {

const RowKernels& avx512_row_kernels() { return kRowKernels; }

}  // namespace rankbook
