#define RANKBOOK_NEON
#include "kernels/attention_kernels.h"

namespace rankbook {

const AttentionKernels& neon_attention_kernels() { return kAttentionKernels; }

}  // namespace rankbook
