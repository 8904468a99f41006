#define RANKBOOK_NEON
#include "kernels/panel_kernels.h"

namespace rankbook {

const PanelKernels& neon_kernels() { return kKernels; }

}  // namespace rankbook
