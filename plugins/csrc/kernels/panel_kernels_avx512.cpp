#include "kernels/panel_kernels.h"

namespace rankbook {

const PanelKernels& avx512_kernels() { return kKernels; }

}  // namespace rankbook
