#pragma once

// The attention operators as ONNX Runtime sees them. Where the library for GPUs is registered they are left out, so that their
// bodies, around ONNX Runtime's own node, run wherever that runs.

#include "kernels/cpu/dispatch.h"
#include "shims/ort/api.h"

namespace rankbook::ort {

// Adds the operators to `domain`. They are never destroyed.
void add_attention(Ort::CustomOpDomain& domain, const AttentionKernels& kernels);

}  // namespace rankbook::ort
