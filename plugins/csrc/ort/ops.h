#pragma once

// The custom operators as ONNX Runtime sees them: names, types, and what runs when a node is created or computed.

#include <memory>
#include <optional>
#include <string>

#include "kernels/dispatch.h"
#include "ort/constants.h"
#include "ort/integer_store.h"

namespace rankbook::ort {

// What an operator computes with.
struct Kernels {
  const PanelKernels& floats;
  const IntegerKernels& integers;
  bool rounds;  // activations to 8 bits
  bool copy;    // constants to huge pages
};

// CodebookMatMul and CodebookMatMulLowRank, and those that end in A8.
class MatMulKernel {
 public:
  MatMulKernel(const Constants& constants, int bits, bool low_rank, const Kernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void compute(const Ort::KernelContext& context) const;
  void read_branch(const Constants& constants);
  Status multiply(const Ort::KernelContext& context, const float* x, int64_t tokens, float* y) const;

  std::string node_;
  const Kernels kernels_;
  WeightStore weight_;
  BranchStore branch_;
  std::optional<IntegerWeightStore> integer_weight_;
  IntegerBranchStore integer_branch_;
  std::vector<float> bias_;
  int64_t out_features_, in_features_;
};

// CodebookGather.
class GatherKernel {
 public:
  GatherKernel(const Constants& constants, int bits);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void compute(const Ort::KernelContext& context) const;

  std::string node_;
  WeightStore weight_;
};

// Adds every operator to `domain`; products round activations where `kernels` says so, and always if named so. They are never destroyed: a session may use them as long as the library is loaded.
void add_operators(Ort::CustomOpDomain& domain, const Kernels& kernels);

}  // namespace rankbook::ort
