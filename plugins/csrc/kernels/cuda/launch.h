// The host interface of the kernels. Functions return a Status, never throw, print or allocate.
#pragma once

#include "kernels/cuda/params.h"

namespace rankbook::cuda {

// Bytes of device scratch that `launch_matmul` needs for these sizes, and for fewer tokens. Pointers are not looked at.
std::size_t matmul_workspace(const Matmul& arguments);

// Enqueues y = x W^T + ... on `stream` (a cudaStream_t).
Status launch_matmul(const Matmul& arguments, void* stream);

// The same for up to kMostProducts products of one x, which have `x`, `type`, `tokens`, `int8_activations` and the number of
// columns in common: x is rounded once where their groups are alike, and kernels of one may run beside those of another.
// The workspace is that of the first.
std::size_t matmuls_workspace(const Matmul* products, int count);
Status launch_matmuls(const Matmul* products, int count, void* stream);

// Enqueues the look-up of rows on `stream`.
Status launch_gather(const Gather& arguments, void* stream);

// Enqueues W (N, K) in `type` into `y`.
Status launch_dense(const PackedWeight& weight, void* y, DataType type, void* stream);

}  // namespace rankbook::cuda
