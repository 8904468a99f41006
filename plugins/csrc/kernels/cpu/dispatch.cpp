#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <iterator>

#if defined(RANKBOOK_X86)
#include <cpuid.h>
#if defined(RANKBOOK_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(RANKBOOK_ARM)
#include <sys/auxv.h>
#endif

namespace rankbook {
// What the processor can do is asked once, when the library is registered. Sets are listed from the least to the best,
// and each overrides those parts of the ones before that it has: AVX-512 without VNNI takes its bytes from AVX-VNNI or
// AVX2.
namespace {

#if defined(RANKBOOK_X86)

// The builtins ask the operating system too: a processor with AVX-512 whose kernel does not save it counts as without.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// F, BW and VL alone: every processor with AVX-512 since Skylake has them.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// VBMI is for vpermb, the byte look-up; Ice Lake and Zen 4 brought both, Cascade Lake has VNNI without it and takes the
// AVX2 form.
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

#if defined(RANKBOOK_AMX)

// Bits 24 and 25 of edx in leaf 7; and Linux (5.16) gives the registers to a process that asks, its threads included:
// ARCH_REQ_XCOMP_PERM for feature 18, the data of tiles. Older ones refuse the call.
bool has_amx() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (!has_avx512_vnni() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx >> 24 & 3U) != 3) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

#endif

#elif defined(RANKBOOK_ARM)

// Headers of old systems do not know the name HWCAP_ASIMDDP.
bool has_dot_product() { return (getauxval(AT_HWCAP) >> 20 & 1U) != 0; }

#endif

struct Candidate {
  Isa isa;
  bool (*runs)();
  const KernelSet& set;
};

// From the least to the best.
const Candidate kCandidates[] = {
#if defined(RANKBOOK_X86)
    {Isa::kAvx2, has_avx2, kAvx2Set},
#if defined(RANKBOOK_AVXVNNI)
    {Isa::kAvxVnni, has_avx_vnni, kAvxVnniSet},
#endif
    {Isa::kAvx512, has_avx512, kAvx512Set},
    {Isa::kAvx512, has_avx512_vnni, kAvx512VnniSet},
#if defined(RANKBOOK_AMX)
    {Isa::kAmx, has_amx, kAmxSet},
#endif
#elif defined(RANKBOOK_ARM)
    {Isa::kNeon, [] { return true; }, kNeonSet},
    {Isa::kDotProd, has_dot_product, kDotProdSet},
#else
    {Isa::kPortable, [] { return true; }, kPortableSet},
#endif
};

}  // namespace

bool read_limit(Isa& limit) {
  const char* wanted = std::getenv("RANKBOOK_NATIVE_ISA");
  limit = Isa::kBest;
  if (wanted == nullptr) return true;
  for (size_t i = 0; i < std::size(kIsaNames); ++i) {
    // Names are in the order of the enumeration.
    limit = static_cast<Isa>(i);
    if (std::strcmp(wanted, kIsaNames[i]) == 0) return true;
  }
  return false;
}

// The portable set has every part, so that no pointer is null at the end.
KernelSet select_kernels(Isa limit) {
  KernelSet best = kPortableSet;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.isa > limit || !candidate.runs()) continue;
    const KernelSet& set = candidate.set;
    if (set.packed != nullptr) best.packed = set.packed;
    if (set.int8 != nullptr) best.int8 = set.int8;
    if (set.attention != nullptr) best.attention = set.attention;
    if (set.rows != nullptr) best.rows = set.rows;
    if (set.groups != nullptr) best.groups = set.groups;
  }
  return best;
}

}  // namespace rankbook
