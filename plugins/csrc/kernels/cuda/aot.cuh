// Each operator as one kernel that takes pointers and 32-bit integers, for engines that hold the PTX themselves: TensorRT's
// ahead-of-time plugins know no structures, no workspace and one kernel per layer (plugins/aot.py).
//
// The error branch is multiplied by every block anew, and every eight tokens decode the weight anew: right for any number
// of tokens, meant for up to eight.
//
// Called by TensorRT with the launch that plugins/aot.py computes; the PTX, made for compute capability 8.0, is what
// test_aot.py interprets. No split of columns over blocks (no workspace), at most 48 KB of shared memory.
#pragma once

#include "contract.h"
#include "kernels/cuda/decode_float.cuh"
#include "kernels/cuda/decode_mma.cuh"

namespace rankbook::cuda::aot {

using namespace contract::aot;  // kTokens, and which forms the constants have: bits of the argument `forms`

// TensorRT hands integers and pointers over, so that the forms of the constants are bits of one integer.
RB_DEVICE bool has(int forms, Form form) { return (forms >> form & 1) != 0; }
RB_DEVICE DataType float_type(int forms, Form half) { return has(forms, half) ? DataType::kFloat16 : DataType::kFloat32; }

template <int kBits>
RB_DEVICE PackedWeight weight_of(const void* codes, const void* levels, const void* params, const void* step,
                                 const void* base, int rows, int columns, int groups, int planes, int forms) {
  PackedWeight w;
  w.codes = static_cast<const std::uint32_t*>(codes);
  w.levels = static_cast<const std::uint16_t*>(levels);
  w.params = static_cast<const std::int8_t*>(params);
  w.step = {step, float_type(forms, kStepFp16)};
  w.base = static_cast<const float*>(base);
  w.params_full = has(forms, kParamsFull);
  w.step_full = has(forms, kStepFull);
  w.base_full = has(forms, kBaseFull);
  w.has_offset = has(forms, kOffset);
  w.rows = rows, w.columns = columns, w.bits = kBits, w.groups = groups, w.params_planes = planes;
  return w;
}

struct Branch {
  const void *down, *down_scale, *up, *up_scale;
  int rank;
};

// Block (x: panel, z: eight tokens). Shared memory: what `decode_mma` needs, then u (8, R).
// u is computed by the whole block before the product, as there is no kernel before this one and no workspace: 8 R K
// multiply-adds a block, as much as the product itself at a rank of 32.
template <int kBits, int kPlanes, typename T>
RB_DEVICE void multiply(const PackedWeight& weight, const void* x, const float* bias, const Branch& branch, int tokens,
                        int forms, void* y) {
  const std::size_t first = static_cast<std::size_t>(blockIdx.z) * kTokens;
  MatmulKernel k;
  Matmul& m = k.m;
  m.weight = weight;
  m.bias = bias, m.bias_full = has(forms, kBiasFull);
  m.x = static_cast<const std::uint16_t*>(x) + first * weight.columns;
  m.y = static_cast<std::uint16_t*>(y) + first * weight.rows;
  m.type = T::kType, m.tokens = tokens - static_cast<int>(first), m.rank = branch.rank;
  if (branch.rank > 0) {
    m.down = {static_cast<const std::int8_t*>(branch.down), {branch.down_scale, float_type(forms, kDownScaleFp16)},
              has(forms, kDownFull), has(forms, kDownScaleFull)};
    m.up = {static_cast<const std::int8_t*>(branch.up), {branch.up_scale, float_type(forms, kUpScaleFp16)},
            has(forms, kUpFull), has(forms, kUpScaleFull)};
    k.u = reinterpret_cast<float*>(shared_memory() + DecodeShared<kBits, kPlanes, T>::bytes(1));
    for (int rank = (thread_index() >> 5) * kBranchRanks; rank < m.rank; rank += kWarps * kBranchRanks) {
      const int lane = thread_index() & 31;
      float sums[32] = {};
      down_sums<T>(m, AllTokens{m.tokens}, rank, 0, 0, 1, sums);
      store_u(m, rank + lane / kBranchTokens, lane % kBranchTokens, sum_of_lanes<>(sums), k.u);
    }
  }
  multiply_panel_mma<kBits, kPlanes, 1, T, false>(k, AllTokens{m.tokens});  // with barriers between here and where u is read
}

}  // namespace rankbook::cuda::aot

#define RB_AOT_WEIGHT const void *codes, const void *levels, const void *params, const void *step, const void *base
#define RB_AOT_SIZES int rows, int columns, int groups, int planes, int forms
#define RB_AOT_WEIGHT_OF(bits) \
  rankbook::cuda::aot::weight_of<bits>(codes, levels, params, step, base, rows, columns, groups, planes, forms)

// extern "C" keeps names readable, since TensorRT looks kernels up by name in the PTX (plugins/aot.py).
#define RB_AOT_MATMUL(bits, count, T, name)                                                                             \
  extern "C" RB_KERNEL(1) rankbook_matmul##bits##_##count##_##name(const void* x, RB_AOT_WEIGHT, const float* bias,      \
                                                                   int tokens, RB_AOT_SIZES, void* y) {                  \
    rankbook::cuda::aot::multiply<bits, count, rankbook::cuda::T>(RB_AOT_WEIGHT_OF(bits), x, bias, {}, tokens, forms, y); \
  }                                                                                                                      \
  extern "C" RB_KERNEL(1) rankbook_matmul_low_rank##bits##_##count##_##name(                                             \
      const void* x, RB_AOT_WEIGHT, const float* bias, const void* down, const void* down_scale, const void* up,         \
      const void* up_scale, int tokens, RB_AOT_SIZES, int rank, void* y) {                                               \
    rankbook::cuda::aot::multiply<bits, count, rankbook::cuda::T>(                                                       \
        RB_AOT_WEIGHT_OF(bits), x, bias, {down, down_scale, up, up_scale, rank}, tokens, forms, y);                      \
  }

#define RB_AOT_PLANES(bits, count)                                                                                  \
  RB_AOT_MATMUL(bits, count, Half, fp16)                                                                            \
  RB_AOT_MATMUL(bits, count, BFloat, bf16)                                                                          \
  extern "C" RB_KERNEL(1) rankbook_gather##bits##_##count(const std::int64_t* indices, RB_AOT_WEIGHT, int items,    \
                                                          RB_AOT_SIZES, float* y) {                                 \
    rankbook::cuda::look_up_rows<bits, count>({RB_AOT_WEIGHT_OF(bits), indices, y, items});                         \
  }

#define RB_AOT(bits) RB_AOT_PLANES(bits, 1) RB_AOT_PLANES(bits, 2) RB_AOT_PLANES(bits, 4)
