// The ONNX Runtime library without CUDA kernels.
#include "shims/ort_cuda/cuda_ops.h"

namespace rankbook::ort {

void add_cuda_operators(Ort::CustomOpDomain&) {}

std::string cuda_state() { return "not built"; }

bool serves_gpu() { return false; }

}  // namespace rankbook::ort
