#pragma once

#include "kernels/cpu/dispatch.h"

// Runs attention on buffers of exactly the size that kernels/attention.h gives them, in place and apart, and compares it with
// plain loops in double. Returns how many cases differ, having said which.
int check_attention(const rankbook::AttentionKernels& kernels, const rankbook::Parallel& parallel);
