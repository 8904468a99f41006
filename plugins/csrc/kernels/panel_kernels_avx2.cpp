#include "kernels/panel_kernels.h"

namespace rankbook {

const PanelKernels& avx2_kernels() { return kKernels; }

}  // namespace rankbook
