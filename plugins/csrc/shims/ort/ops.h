#pragma once

// The custom operators as ONNX Runtime sees them: names, types, and what runs when a node is created or computed.

#include <functional>
#include <string>
#include <vector>

#include "shims/ort/product.h"

namespace rankbook::ort {

// CodebookMatMul and CodebookMatMulLowRank, those that end in A8, and those of several products.
class MatMulKernel {
 public:
  using Read = std::function<std::vector<Product>(const Ort::KernelContext&)>;

  // `products` are what the constants of the node say. Without any, `read` reads them in each call: slow, and for the
  // nodes alone whose constants other nodes compute.
  MatMulKernel(std::vector<Product> products, Read read, std::string node, const Kernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  struct Call;  // products of one call, and x and every y in fp32
  void compute(const Ort::KernelContext& context) const;
  void compute_half(Call& call, bool half, const void* x, void* const* results) const;
  void multiply(const Call& call) const;

  std::vector<Product> products_;
  Read read_;
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
