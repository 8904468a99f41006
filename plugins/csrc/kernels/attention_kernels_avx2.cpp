#include "kernels/attention_kernels.h"

namespace rankbook {

const AttentionKernels& avx2_attention_kernels() { return kAttentionKernels; }

}  // namespace rankbook
