#pragma once

// The operators on a GPU, registered for ONNX Runtime's CUDA execution provider beside the CPU ones of the same names.
// Two files define these functions: cuda_ops.cpp for librankbook_ort_cuda.so, no_cuda.cpp for librankbook_ort.so.

#include <string>

#include "shims/ort/api.h"

namespace rankbook::ort {

// Adds the operators to `domain`. They are never destroyed. No GPU or driver is needed; without one ONNX Runtime has no
// CUDA execution provider either, and never creates them.
void add_cuda_operators(Ort::CustomOpDomain& domain);

// "not built", "1 device", or CUDA's own words about why there is none.
std::string cuda_state();

// Whether this is the library for GPUs.
bool serves_gpu();

}  // namespace rankbook::ort
