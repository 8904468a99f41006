#pragma once

// The operators on rows as ONNX Runtime sees them (plugins/rows.py); like attention, for the CPU's library alone.

#include "kernels/cpu/dispatch.h"
#include "shims/ort/api.h"

namespace rankbook::ort {

// Adds the operators to `domain`. They are never destroyed.
void add_row_operators(Ort::CustomOpDomain& domain, const RowKernels& kernels);

}  // namespace rankbook::ort
