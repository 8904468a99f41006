#include "kernels/dispatch.h"

#if defined(RANKBOOK_X86)
#include <cpuid.h>
#elif defined(RANKBOOK_ARM)
#include <sys/auxv.h>
#endif

namespace rankbook {
namespace {

#if defined(RANKBOOK_X86)

// The builtins ask the operating system too: a processor with AVX-512 whose kernel does not save it counts as without.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

#if defined(RANKBOOK_AVXVNNI)

// Older compilers do not know the name: leaf 7, subleaf 1, bit 4 of eax.
bool has_avx_vnni() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1U) != 0;
}

#endif

#elif defined(RANKBOOK_ARM)

// Headers of old systems do not know the name HWCAP_ASIMDDP.
bool has_dot_product() { return (getauxval(AT_HWCAP) >> 20 & 1U) != 0; }

#endif

}  // namespace

const PanelKernels& select_kernels(Isa limit) {
#if defined(RANKBOOK_X86)
  if (limit >= Isa::kAvx512 && has_avx512()) return avx512_kernels();
  if (limit >= Isa::kAvx2 && has_avx2()) return avx2_kernels();
#elif defined(RANKBOOK_ARM)
  if (limit >= Isa::kNeon) return neon_kernels();
#else
  static_cast<void>(limit);
#endif
  return portable_kernels();
}

const IntegerKernels& select_integer_kernels(Isa limit) {
#if defined(RANKBOOK_X86)
  if (limit >= Isa::kAvx512 && has_avx512_vnni()) return avx512_integer_kernels();
#if defined(RANKBOOK_AVXVNNI)
  if (limit >= Isa::kAvxVnni && has_avx_vnni()) return avxvnni_integer_kernels();
#endif
  if (limit >= Isa::kAvx2 && has_avx2()) return avx2_integer_kernels();
#elif defined(RANKBOOK_ARM)
  if (limit >= Isa::kDotProd && has_dot_product()) return dotprod_integer_kernels();
  if (limit >= Isa::kNeon) return neon_integer_kernels();
#else
  static_cast<void>(limit);
#endif
  return portable_integer_kernels();
}

const AttentionKernels& select_attention_kernels(Isa limit) {
#if defined(RANKBOOK_X86)
  if (limit >= Isa::kAvx512 && has_avx512()) return avx512_attention_kernels();
  if (limit >= Isa::kAvx2 && has_avx2()) return avx2_attention_kernels();
#elif defined(RANKBOOK_ARM)
  if (limit >= Isa::kNeon) return neon_attention_kernels();
#else
  static_cast<void>(limit);
#endif
  return portable_attention_kernels();
}

const RowKernels& select_row_kernels(Isa limit) {
#if defined(RANKBOOK_X86)
  if (limit >= Isa::kAvx512 && has_avx512()) return avx512_row_kernels();
  if (limit >= Isa::kAvx2 && has_avx2()) return avx2_row_kernels();
#elif defined(RANKBOOK_ARM)
  if (limit >= Isa::kNeon) return neon_row_kernels();
#else
  static_cast<void>(limit);
#endif
  return portable_row_kernels();
}

}  // namespace rankbook
