#include "kernels/dispatch.h"

namespace rankbook {

const PanelKernels& select_kernels(Isa limit) {
#if defined(RANKBOOK_X86)
  // The builtins ask the operating system too: a processor with AVX-512 whose kernel does not save it counts as without.
  if (limit >= Isa::kAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_kernels();
  }
  if (limit >= Isa::kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2_kernels();
  }
#else
  static_cast<void>(limit);
#endif
  return portable_kernels();
}

}  // namespace rankbook
