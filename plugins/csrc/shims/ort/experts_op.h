#pragma once

// Products of experts as ONNX Runtime sees them (plugins/experts.py), on the CPU; those of a GPU are in cuda_ops.cpp.

#include "shims/ort/product.h"

namespace rankbook::ort {

// Adds the operators to `domain`; they round activations where `kernels` says so, and always if named so. They are never
// destroyed.
void add_experts(Ort::CustomOpDomain& domain, const Kernels& kernels);

}  // namespace rankbook::ort
