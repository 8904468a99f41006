// The C interface of library.cpp on a real GPU, so that the tests of the emulation run there unchanged (GPU.md).
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"

using rankbook::cuda::Status;

namespace {

std::string last_error;

int report(const Status& status) {
  last_error = status.ok() ? "" : status.message;
  if (last_error.empty()) {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) last_error = cudaGetErrorString(error);
  }
  return last_error.empty() ? 0 : 1;
}

int report(cudaError_t error) { return report(error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)}); }

}  // namespace

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

RB_EXPORT const char* rb_error() { return last_error.c_str(); }

// Device memory with a copy of `bytes` bytes; null and an error where that fails.
RB_EXPORT void* rb_upload(const void* data, std::size_t bytes) {
  void* address = nullptr;
  if (report(cudaMalloc(&address, bytes > 0 ? bytes : 1)) != 0) return nullptr;
  return report(cudaMemcpy(address, data, bytes, cudaMemcpyHostToDevice)) == 0 ? address : nullptr;
}

RB_EXPORT int rb_download(void* data, const void* address, std::size_t bytes) {
  return report(cudaMemcpy(data, address, bytes, cudaMemcpyDeviceToHost));
}

RB_EXPORT int rb_free(void* address) { return report(cudaFree(address)); }

RB_EXPORT std::size_t rb_workspace(const rankbook::cuda::Matmul* arguments) {
  return rankbook::cuda::matmul_workspace(*arguments);
}

RB_EXPORT int rb_matmul(const rankbook::cuda::Matmul* arguments) {
  return report(rankbook::cuda::launch_matmul(*arguments, nullptr));
}

RB_EXPORT std::size_t rb_workspace_of_several(const rankbook::cuda::Matmul* products, int count) {
  return rankbook::cuda::matmuls_workspace(products, count);
}

RB_EXPORT int rb_several(const rankbook::cuda::Matmul* products, int count) {
  return report(rankbook::cuda::launch_matmuls(products, count, nullptr));
}

RB_EXPORT int rb_gather(const rankbook::cuda::Gather* arguments) {
  return report(rankbook::cuda::launch_gather(*arguments, nullptr));
}

RB_EXPORT int rb_dense(const rankbook::cuda::PackedWeight* weight, void* y, int type) {
  return report(rankbook::cuda::launch_dense(*weight, y, static_cast<rankbook::cuda::DataType>(type), nullptr));
}
