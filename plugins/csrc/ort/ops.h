#pragma once

// The custom operators as ONNX Runtime sees them: names, types, and what runs when a node is created or computed.

#include <string>

#include "kernels/dispatch.h"
#include "ort/constants.h"

namespace rankbook::ort {

// CodebookMatMul and CodebookMatMulLowRank.
class MatMulKernel {
 public:
  MatMulKernel(const Constants& constants, int bits, bool low_rank, const PanelKernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void compute(const Ort::KernelContext& context) const;

  std::string node_;
  const PanelKernels& kernels_;
  WeightStore weight_;
  BranchStore branch_;
  std::vector<float> bias_;
  int64_t out_features_, in_features_;
};

// CodebookGather.
class GatherKernel {
 public:
  GatherKernel(const Constants& constants, int bits, const PanelKernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void compute(const Ort::KernelContext& context) const;

  std::string node_;
  WeightStore weight_;
};

// Adds every operator to `domain`. The operators are static: a session may use them as long as the library is loaded.
void add_operators(Ort::CustomOpDomain& domain, const PanelKernels& kernels);

}  // namespace rankbook::ort
