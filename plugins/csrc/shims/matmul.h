#pragma once

// A layer as the CUDA kernels take it, for both of their shims.
// What read_layer has checked fits the structures: sizes below 2^31, planes and columns within the kernels' limits.

#include "kernels/cuda/params.h"
#include "shims/view.h"

namespace rankbook {

static_assert(contract::kCudaPlanes == cuda::kMaxPlanes && contract::kPanel == cuda::kPanel && contract::kBlock == cuda::kBlock);

// Of parameters and factors: 8 bits mean codes, whose scales and steps are fp32.
inline cuda::DataType float_of(int bits) { return bits == 16 ? cuda::DataType::kFloat16 : cuda::DataType::kFloat32; }

// Sizes and forms, without pointers.
// Made once, when a node or an engine is set up; a call adds pointers, x, y and the number of tokens.
// `stacked`: of how many experts the constants are, or 0.
inline cuda::Matmul matmul_of(const Layer& layer, bool int8_activations, int64_t stacked) {
  cuda::Matmul out;
  cuda::PackedWeight& w = out.weight;
  w.bits = layer.bits;
  w.rows = static_cast<int>(layer.rows);
  w.columns = static_cast<int>(layer.columns);
  w.groups = static_cast<int>(layer.groups);
  w.params_planes = static_cast<int>(layer.param_planes);
  w.has_offset = layer.has_offset;
  w.params_full = w.base_full = layer.param_bits() == 8;
  w.step_full = !w.params_full;
  w.step.type = float_of(layer.param_bits());
  out.bias_full = layer.has_bias();
  out.rank = static_cast<int>(layer.rank);
  for (cuda::Factor* factor : {&out.down, &out.up}) {
    factor->codes_full = layer.factor_bits() == 8;
    factor->scale_full = !factor->codes_full;
    factor->scale.type = float_of(layer.factor_bits());
  }
  out.int8_activations = int8_activations;
  out.experts = static_cast<int>(stacked);
  return out;
}

// `at` gives the address of a constant by its position among the inputs.
// Placeholders are bound like everything else: the kernels read the one element where a form says so.
template <class Address>
void set_constants(const Layer& layer, Address&& at, cuda::Matmul* m) {
  cuda::PackedWeight& w = m->weight;
  w.codes = static_cast<const std::uint32_t*>(at(Port::kCodes));
  w.levels = static_cast<const std::uint16_t*>(at(Port::kLevels));
  w.params = static_cast<const std::int8_t*>(at(Port::kParams));
  w.step.data = at(Port::kStep);
  w.base = static_cast<const float*>(at(Port::kBase));
  if (layer.has_part(contract::kBiasPart)) m->bias = static_cast<const float*>(at(Port::kBias));
  if (layer.rank == 0) return;
  m->down.codes = static_cast<const std::int8_t*>(at(Port::kDown));
  m->down.scale.data = at(Port::kDownScale);
  m->up.codes = static_cast<const std::int8_t*>(at(Port::kUp));
  m->up.scale.data = at(Port::kUpScale);
}

}  // namespace rankbook
