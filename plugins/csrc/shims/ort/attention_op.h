#pragma once

// The attention operator as ONNX Runtime sees it. Where the library for GPUs is registered it is left out, so that its body,
// ONNX Runtime's own node, runs wherever that runs.

#include "kernels/cpu/dispatch.h"
#include "shims/ort/api.h"

namespace rankbook::ort {

// Adds the operator to `domain`. It is never destroyed.
void add_attention(Ort::CustomOpDomain& domain, const AttentionKernels& kernels);

}  // namespace rankbook::ort
