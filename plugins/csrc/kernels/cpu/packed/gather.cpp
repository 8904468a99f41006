// Rows of a codebook weight: an embedding. One row touches every 128th byte of its panel, so there is nothing for vectors
// to do; plain code, one task per row.

#include <cstring>

#include "kernels/cpu/packed/codebook.h"
#include "kernels/cpu/simd/half.h"

namespace rankbook {
namespace {

// The bit order of plugins/layout.py for one code. With 3 bits, word A holds codes 0, 1 and half of 6, B codes 2, 3 and
// half of 7, C codes 4, 5 and the third bits of both.
uint32_t code_at(const CodebookWeight& weight, const uint8_t* row, int64_t k) {
  const uint8_t* block = row + k / kBlock * weight.bits * kWordBytes;
  const int64_t input = k % kBlock;
  const auto byte = [block](int64_t word, int64_t index) { return block[word * kWordBytes + index] ^ 0x80U; };
  if (weight.bits != 3) {
    const int64_t bit = input * weight.bits;
    return byte(bit / 32, bit % 32 / 8) >> (bit % 8) & ((1U << weight.bits) - 1U);
  }
  const int64_t index = input / 8;
  const int64_t code = input % 8;
  if (code < 6) return byte(code / 2, index) >> (code % 2 * 3) & 7U;
  return byte(code - 6, index) >> 6 | (byte(2, index) >> code & 1U) << 2;
}

// In the order of operations of the reference, params * step + base, so that rows equal it but for the sum over planes.
// Not fused: params * step + base with two roundings is what numpy computes, and this file is compiled without
// contraction.
float param_at(const CodebookWeight& weight, int64_t panel, int64_t group, int64_t plane, int64_t lane) {
  const int64_t planes = weight.param_planes();
  const int64_t at = ((panel * weight.groups + group) * planes + plane) * kPanel + lane;
  switch (weight.form) {
    case ParamForm::kInt8: {
      const float stored = static_cast<const int8_t*>(weight.params)[at];
      return stored * weight.step[panel * planes + plane] + weight.base[panel * planes + plane];
    }
    case ParamForm::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(weight.params)[at]);
    default:
      return static_cast<const float*>(weight.params)[at];
  }
}

// The finished codebook of one row and group, as on a GPU: with 2 to 4 bits 4 to 16 entries serve a group of 64 inputs.
// With 8 bits a group is smaller than its table, which is why embeddings of 8 bits are better stored with long groups.
void gather_row(const CodebookWeight& weight, int64_t index, float* y) {
  const int64_t panel = index / kPanel;
  const int64_t lane = index % kPanel;
  const uint8_t* row = weight.codes + panel * weight.blocks() * weight.bits * kWordBytes + lane * 4;
  const int64_t group_size = weight.in_features / weight.groups;
  const int64_t levels = int64_t{1} << weight.bits;
  for (int64_t group = 0; group < weight.groups; ++group) {
    float table[256];  // 2^b entries once for a group cost less than the sum over planes for each of its inputs
    const float offset = weight.has_offset ? param_at(weight, panel, group, weight.planes, lane) : 0.0F;
    for (int64_t code = 0; code < levels; ++code) table[code] = offset;
    for (int64_t plane = 0; plane < weight.planes; ++plane) {
      const float factor = param_at(weight, panel, group, plane, lane);
      for (int64_t code = 0; code < levels; ++code) table[code] += factor * weight.levels[plane * levels + code];
    }
    for (int64_t k = group * group_size; k < (group + 1) * group_size; ++k) y[k] = table[code_at(weight, row, k)];
  }
}

void gather_task(void* argument, int64_t index) {
  const GatherArgs& args = *static_cast<const GatherArgs*>(argument);
  gather_row(args.weight, args.indices[index], args.y + index * args.weight.in_features);
}

}  // namespace

// Indices are checked before any row is written: a negative index that counts from the end is ONNX's habit in Gather,
// not this operator's. A decode step looks up one row; threads are worth their waking from a prompt of nine tokens on.
Status codebook_gather(const GatherArgs& args, const Parallel& parallel) {
  const Status status = check_weight(args.weight);
  if (!status.ok()) return status;
  for (int64_t i = 0; i < args.count; ++i) {
    if (args.indices[i] < 0 || args.indices[i] >= args.weight.out_features) return refusal::kIndex;
  }
  GatherArgs shared = args;
  if (args.count > 8 && parallel.run != nullptr) {
    parallel.run(parallel.pool, args.count, gather_task, &shared);
  } else {
    for (int64_t i = 0; i < args.count; ++i) gather_task(&shared, i);
  }
  return {};
}

}  // namespace rankbook
