// The host interface of the kernels. Functions return a Status, never throw, print or allocate.
#pragma once

#include "kernels/cuda/params.h"

namespace rankbook::cuda {

// Bytes of device scratch that `launch_matmul` needs for these sizes, and for fewer tokens. Pointers are not looked at.
std::size_t matmul_workspace(const Matmul& arguments);

// Enqueues y = x W^T + ... on `stream` (a cudaStream_t).
Status launch_matmul(const Matmul& arguments, void* stream);

// Enqueues the look-up of rows on `stream`.
Status launch_gather(const Gather& arguments, void* stream);

// Enqueues W (N, K) in `type` into `y`.
Status launch_dense(const PackedWeight& weight, void* y, DataType type, void* stream);

}  // namespace rankbook::cuda
