// The host interface of the CUDA kernels (kernels/cuda/launch.h) in C, for callers that load the library and fill its
// structures themselves: plugins/cuda_abi.py mirrors them. Functions return null, or a sentence that says what is wrong.
#include <cstring>

#include "kernels/cuda/launch.h"

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

using namespace rankbook::cuda;

// Bytes of a structure, which a mirror must have too; 0 for another name.
RB_EXPORT std::size_t rankbook_cuda_size(const char* name) {
  const struct {
    const char* name;
    std::size_t bytes;
  } all[] = {{"Floats", sizeof(Floats)}, {"PackedWeight", sizeof(PackedWeight)}, {"Factor", sizeof(Factor)},
             {"Matmul", sizeof(Matmul)}, {"Gather", sizeof(Gather)}};
  for (const auto& each : all) {
    if (std::strcmp(each.name, name) == 0) return each.bytes;
  }
  return 0;
}

RB_EXPORT std::size_t rankbook_cuda_workspace(const Matmul* arguments) { return matmul_workspace(*arguments); }

RB_EXPORT const char* rankbook_cuda_matmul(const Matmul* arguments, void* stream) {
  return launch_matmul(*arguments, stream).message;
}

RB_EXPORT const char* rankbook_cuda_gather(const Gather* arguments, void* stream) {
  return launch_gather(*arguments, stream).message;
}
