// What TensorRT's headers and the shims need of CUDA's, for tests on a machine without the toolkit.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <vector>

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };

inline const char* cudaGetErrorString(cudaError_t) { return "no error of the emulation"; }

inline std::vector<std::function<void()>>& copies_on_their_way() {
  static std::vector<std::function<void()>> copies;
  return copies;
}

// From memory that is not pinned CUDA may return before the bytes have arrived. Here they never do before the stream is
// waited for: who does not wait computes with NaN.
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memset(to, 0xff, bytes);
  copies_on_their_way().push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  for (const auto& copy : copies_on_their_way()) copy();
  copies_on_their_way().clear();
  return cudaSuccess;
}
