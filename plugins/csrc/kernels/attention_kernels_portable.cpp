#include "kernels/attention_kernels.h"

namespace rankbook {

const AttentionKernels& portable_attention_kernels() { return kAttentionKernels; }

}  // namespace rankbook
