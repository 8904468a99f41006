#pragma once

// The custom operators as ONNX Runtime sees them: names, types, and what runs when a node is created or computed.

#include <string>
#include <vector>

#include "shims/ort/product.h"

namespace rankbook::ort {

// CodebookMatMul and CodebookMatMulLowRank, those that end in A8, and those of several products.
class MatMulKernel {
 public:
  MatMulKernel(std::vector<Product> products, std::string node, const Kernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  struct Call;  // x and every y of one call, in fp32
  void compute(const Ort::KernelContext& context) const;
  void compute_half(Call& call, bool half, const void* x, void* const* results) const;
  void multiply(const Call& call) const;

  std::vector<Product> products_;
  std::string node_;
  const Kernels kernels_;
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
