#define RANKBOOK_NEON
#include "kernels/row_kernels.h"

namespace rankbook {

const RowKernels& neon_row_kernels() { return kRowKernels; }

}  // namespace rankbook
