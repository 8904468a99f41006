// The kernels that test_ptx.py compiles to PTX for the architectures whose PTX the library does not carry.
#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {

#define RB_KERNELS(bits, T)                                                \
  template __global__ void decode_mma<bits, 1, 1, T>(MatmulKernel);        \
  template __global__ void decode_mma<bits, 2, 1, T>(MatmulKernel);

RB_KERNELS(2, Half)
RB_KERNELS(3, BFloat)
RB_KERNELS(4, Half)
template __global__ void decode_mma<8, 1, 2, Half>(MatmulKernel);
template __global__ void decode_float<3, 2, 4>(MatmulKernel);
template __global__ void branch_down<Half>(MatmulKernel);
template __global__ void branch_down<BFloat>(MatmulKernel);
template __global__ void branch_down_mma<Half, 1>(MatmulKernel);
template __global__ void decode_dense<4, 2, Half>(DenseKernel);
template __global__ void gemm_mma<Half>(MatmulKernel);
template __global__ void gather_rows<4, 2>(Gather);
template __global__ void round_activations<Half>(RoundKernel);
template __global__ void branch_down_int8<>(Int8Kernel);
template __global__ void decode_int8<3, 2, 1, 1>(Int8Kernel);
template __global__ void decode_int8<4, 1, 8, 2>(Int8Kernel);
template __global__ void prefill_mma<4, 2, Half>(PrefillKernel);
template __global__ void add_shares<Half>(PrefillKernel);
template __global__ void sort_tokens<>(ExpertKernel);
template __global__ void experts_down<Half>(ExpertKernel);
template __global__ void experts_tile_mma<4, 2, Half>(ExpertKernel);
template __global__ void experts_mma<4, 1, Half>(ExpertKernel);

}  // namespace rankbook::cuda
