#include "kernels/panel_kernels.h"

namespace rankbook {

const PanelKernels& portable_kernels() { return kKernels; }

}  // namespace rankbook
