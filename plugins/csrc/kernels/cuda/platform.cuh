// What the kernels need from the machine, once for nvcc and once (csrc/emulation/simt.h) for a plain C++ compiler.
//
// Kernels touch global memory only through load/store and their vector forms, so that the emulation can check every
// address; half and bfloat16 travel as raw bits, because two C++ compilers agree on nothing else.
#pragma once

#include "kernels/cuda/params.h"

#ifdef RANKBOOK_EMULATION
#include "emulation/simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

// Everything is inlined into its kernel: a call would put arrays of registers into memory.
#define RB_DEVICE __device__ __forceinline__
#define RB_KERNEL(...) __global__ void __launch_bounds__(rankbook::cuda::kWarps * 32, __VA_ARGS__)
#define RB_KERNEL_REGISTERS(...) __global__ void __maxnreg__(__VA_ARGS__)

namespace rankbook::cuda {

constexpr int kMostBlocksY = 65535;  // of a grid; in x there may be 2^31 - 1

// Registers of a thread of a kernel of which one block runs on a multiprocessor, so that one of `branch_down_mma`, with 40 or 48,
// has room beside it, where kernels start early.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kRegistersBeside = 208;
#else
constexpr int kRegistersBeside = 255;
#endif

// Bytes of a dense weight in scratch: one that needs more (1 GB in fp16 for a head of 128,256 x 4,096) is decoded and
// multiplied in parts. A part this large still has 4,096 rows of 16,384 inputs, enough blocks for any GPU.
constexpr std::size_t kMostDense = std::size_t{128} << 20;

// Blocks from which one of `branch_down_mma` takes 16 tokens and not 8: `down` is read half as often then, and beside one block
// a multiprocessor has room for one of the product.
constexpr int kWideBranch = 128;

// Columns for which one block more shares x down^T, see `branch_shares`.
constexpr int kUShareColumns = 1024;

template <typename T>
RB_DEVICE T load(const T* address) {
  return __ldg(address);
}

// Packed codes are read once: they must not push activations and parameters out of the first-level cache.
RB_DEVICE uint4 load_codes(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// For memory that this launch or the one before it wrote: not through the read-only cache.
template <typename T>
RB_DEVICE T load_fresh(const T* address) {
  return *address;
}

template <typename T>
RB_DEVICE void store(T* address, T value) {
  *address = value;
}

// Blocks are eight warps in x throughout, so that a warp's number is a shift.
RB_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RB_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
RB_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
RB_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
RB_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
RB_DEVICE void barrier() { __syncthreads(); }
RB_DEVICE void warp_barrier() { __syncwarp(); }
template <typename T>
RB_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Dynamic only: one size per kernel, known to the launch, and 128-byte alignment for entries of tables.
RB_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Four bytes of the eight of a (bytes 0 to 3) and b, by the low four nibbles of `selector`, each 0 to 7.
RB_DEVICE std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  std::uint32_t out;  // not __byte_perm: it clears the bits that are known to be zero
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

// Results of other blocks: written with `publish`, counted with `arrive`, and read with `load_other` by the last one.
// Both sides go past the first-level cache (.cg), which is not coherent between multiprocessors. The fence before the
// counter orders a block's sums before its arrival, the one in see_others what is read after it.
RB_DEVICE void publish(float* address, float value) { __stcg(address, value); }
RB_DEVICE float load_other(const float* address) { return __ldcg(address); }
RB_DEVICE unsigned arrive(unsigned* counter) {
  __threadfence();
  return atomicAdd(counter, 1u);
}
RB_DEVICE void see_others() { __threadfence(); }

// Shared memory by its own 32-bit addresses: through pointers, newer architectures add its base to every access. Volatile,
// so that no read moves before the barrier behind the writes.
// A 64-bit pointer costs two registers, and on sm_90 an addition of the window's base at every access: 3.05 against
// 2.70 instructions a weight in a prototype.
RB_DEVICE unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }
RB_DEVICE void read_shared(unsigned at, std::uint32_t& a) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(at));
}
RB_DEVICE void read_shared(unsigned at, std::uint32_t& a, std::uint32_t& b) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(at));
}
RB_DEVICE void read_shared(unsigned at, std::uint32_t& a, std::uint32_t& b, std::uint32_t& c, std::uint32_t& d) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at));
}

// Programmatic dependent launch (sm_90 on): a kernel that is launched early, see `Start`, may begin once every block of the
// kernel before it has begun and come to `let_next_start`, or ended. What earlier kernels of the product write may be
// touched behind `wait_for_earlier` only: it returns when they have ended and all they wrote can be seen. Every thread of a
// kernel that may be launched early comes to it, so that the end of one kernel is also the end of those before it.
// Launched in turn, both do nothing.
RB_DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
RB_DEVICE void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks the second-level cache for `bytes` bytes, a multiple of 16 from a multiple of 16 on; by a whole warp.
RB_DEVICE void prefetch(const void* from, unsigned bytes) {
  const unsigned lane = threadIdx.x & 31;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (lane == 0 && bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#else
  for (unsigned at = 128 * lane; at < bytes; at += 128 * 32) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
  }
#endif
}

// Keeps a number in its register: the compiler would compute it anew in every loop.
RB_DEVICE unsigned kept(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}
// Rounding is part of the definition of int8 activations: fused where it says so, never by the compiler's choice alone.
RB_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RB_DEVICE int round_to_int(float value) { return __float2int_rn(value); }  // ties to even
// Starts a copy of 16 bytes (zeros unless `inside`) to a shared address; groups of copies arrive in the order in which they
// were committed, for the thread that started them. Before Ampere: at once.
RB_DEVICE void copy_async(unsigned to, const void* from, bool inside) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
#else
  uint4 v = {0u, 0u, 0u, 0u};
  if (inside) v = *static_cast<const uint4*>(from);
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
RB_DEVICE void commit_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending groups of this thread are on their way.
template <int kPending>
RB_DEVICE void wait_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

RB_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
RB_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
RB_DEVICE float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
RB_DEVICE std::uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
RB_DEVICE float bfloat_to_float(std::uint16_t bits) { return __uint_as_float(static_cast<std::uint32_t>(bits) << 16); }
RB_DEVICE std::uint16_t float_to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// Bits and not __half2 are what kernels hold: the emulation knows no half type.
RB_DEVICE std::uint32_t as_bits(__half2 v) { return *reinterpret_cast<std::uint32_t*>(&v); }
RB_DEVICE __half2 as_half2(std::uint32_t v) { return *reinterpret_cast<__half2*>(&v); }
RB_DEVICE std::uint32_t pack_half(float low, float high) { return as_bits(__floats2half2_rn(low, high)); }
RB_DEVICE std::uint32_t pack_bfloat(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<std::uint32_t*>(&v);
}
RB_DEVICE float2 unpack_half(std::uint32_t v) { return __half22float2(as_half2(v)); }
RB_DEVICE std::uint32_t fma_half(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  return as_bits(__hfma2(as_half2(a), as_half2(b), as_half2(c)));
}

// The low or the high half, twice; the compiler makes it part of the instruction that uses it.
RB_DEVICE std::uint32_t spread_half(std::uint32_t v, int high) {
  return as_bits(high ? __high2half2(as_half2(v)) : __low2half2(as_half2(v)));
}
// v >> 16 on the multiplier's pipe. As assembler, because the compiler would shift before it masks, and mask twice.
RB_DEVICE std::uint32_t upper_half(std::uint32_t v) {
  std::uint32_t out;
  asm("mul.hi.u32 %0, %1, 65536;" : "=r"(out) : "r"(v));
  return out;
}
RB_DEVICE unsigned multiply_high(unsigned a, unsigned b) { return __umulhi(a, b); }
// a & b ^ c in one instruction; the compiler takes two where b and c are both constants.
RB_DEVICE std::uint32_t and_xor(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8), fragments as in the PTX manual, section "mma.m16n8k16".
RB_DEVICE void mma_half(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing has the half of it: the fragments of m16n8k16 are those of two m16n8k8
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kHasBFloatMma = true;
#else
constexpr bool kHasBFloatMma = false;
#endif
RB_DEVICE void mma_bfloat(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing has no bfloat16, and no runtime offers it there
  __trap();
#endif
}

// The same for whole numbers: d (16 x 8, int32) = a (16 x 32, int8) b (32 x 8, int8) + c, "mma.m16n8k32". d may be c.
// Twice the multiply-adds of an fp16 product in the same number of registers.
RB_DEVICE void mma_int8(int (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const int (&c)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else  // Turing: four m8n8k16, whose fragments are the quarters of those of m16n8k32
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 2 * (i % 2);
    const int low = i < 2 ? c[at] : d[at], high = i < 2 ? c[at + 1] : d[at + 1];
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
        : "=r"(d[at]), "=r"(d[at + 1])
        : "r"(a[i]), "r"(i < 2 ? b0 : b1), "r"(low), "r"(high));
  }
#endif
}

// More than 48 KB of shared memory a kernel gets only when asked for.
template <typename Arguments>
cudaError_t allow_shared(void (*kernel)(Arguments), std::size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// A number that depends on the current device, asked for once on each of them: questions take the driver about as long as a
// launch. Never 0.
class PerDevice {
 public:
  template <typename Ask>
  int get(Ask ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kDevices) return ask(device);
    int known = known_[device].load(std::memory_order_relaxed);
    if (known == 0) known_[device].store(known = ask(device), std::memory_order_relaxed);
    return known;
  }

 private:
  static constexpr int kDevices = 16;
  std::atomic<int> known_[kDevices] = {};
};

// How many blocks of one kernel the current device runs at once. Registers decide: the launch bounds promise two blocks a
// multiprocessor, and with a form whose loop needs fewer there are three.
class Residency {
 public:
  // 1 where there is no device: the launch will say so.
  template <typename Arguments>
  int blocks(void (*kernel)(Arguments), std::size_t shared_bytes) {
    return blocks_.get([&](int device) {
      int each = 0, multiprocessors = 0;
      const bool known =
          allow_shared(kernel, shared_bytes) == cudaSuccess &&
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kWarps * 32, shared_bytes) == cudaSuccess &&
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
      return known && each > 0 ? each * multiprocessors : 1;
    });
  }

 private:
  PerDevice blocks_;
};

// Whether kernels of this library wait for earlier ones in the code that the current device runs: made for sm_90 or later.
// Code made for sm_80 does not, wherever it runs, and must never start early. All kernels are made for the same
// architectures, so that one answers for all.
template <typename Arguments>
bool starts_early(void (*kernel)(Arguments)) {
  static PerDevice answer;
  return answer.get([&](int) {
    cudaFuncAttributes about = {};
    return cudaFuncGetAttributes(&about, kernel) == cudaSuccess && about.ptxVersion >= 90 ? 2 : 1;
  }) == 2;
}

// A sentence for an error of the runtime. A kernel is loaded when it is first launched, which a stream that is being
// captured does not allow: whoever captures has to run every shape once before.
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  if (error == cudaErrorStreamCaptureUnsupported || error == cudaErrorStreamCaptureInvalidated) {
    return {"the stream is being captured and a kernel was not loaded yet: run every shape once before the capture"};
  }
  return {cudaGetErrorString(error)};
}

// A memset is a node of a CUDA graph like a kernel; it is used only where no kernel runs before the one that counts.
inline Status clear(void* address, std::size_t bytes, void* stream) {
  return status_of(cudaMemsetAsync(address, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Arguments are one structure by value, some 300 bytes of the 4 KB that a launch may carry.
template <typename Arguments>
Status launch(void (*kernel)(Arguments), dim3 grid, std::size_t shared_bytes, void* stream, const Arguments& arguments,
              Start start = Start::kInTurn) {
  if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return status_of(error);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(kWarps * 32), config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early, config.numAttrs = start == Start::kEarly && starts_early(kernel) ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace rankbook::cuda
#endif

namespace rankbook::cuda {

// Activation types: how one element, and two neighbours in a 32-bit register, become floats and back.
struct Float {
  using Stored = float;
  static constexpr DataType kType = DataType::kFloat32;
  static RB_DEVICE float decode(float value) { return value; }
  static RB_DEVICE float encode(float value) { return value; }
};

struct Half {
  using Stored = std::uint16_t;
  static constexpr DataType kType = DataType::kFloat16;
  static RB_DEVICE float decode(std::uint16_t bits) { return half_to_float(bits); }
  static RB_DEVICE std::uint16_t encode(float value) { return float_to_half(value); }
  static RB_DEVICE std::uint32_t pack(float low, float high) { return pack_half(low, high); }
  static RB_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    mma_half(c, a, b0, b1);
  }
};

struct BFloat {
  using Stored = std::uint16_t;
  static constexpr DataType kType = DataType::kBFloat16;
  static RB_DEVICE float decode(std::uint16_t bits) { return bfloat_to_float(bits); }
  static RB_DEVICE std::uint16_t encode(float value) { return float_to_bfloat(value); }
  static RB_DEVICE std::uint32_t pack(float low, float high) { return pack_bfloat(low, high); }
  static RB_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    mma_bfloat(c, a, b0, b1);
  }
};

}  // namespace rankbook::cuda
