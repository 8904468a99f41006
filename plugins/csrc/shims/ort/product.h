#pragma once

// One product of a node: what is kept of its constant inputs, for either mode.

#include <optional>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "shims/ort/constants.h"
#include "shims/ort/int8_store.h"

namespace rankbook::ort {

// What an operator computes with.
struct Kernels {
  const PanelKernels& floats;
  const Int8Kernels& int8;
  bool rounds;  // activations to 8 bits
  bool copy;    // constants to huge pages
};

class Product {
 public:
  Product(const Constants& constants, const Layer& layer, const Kernels& kernels);

  // Copies what is read at every call to huge pages, where there are any. `products` are all of a node, `constants` theirs.
  static void copy(std::vector<Product>& products, const std::vector<Constants>& constants);

  int64_t out_features() const { return weight_.sizes().out_features; }
  int64_t in_features() const { return weight_.sizes().in_features; }
  int64_t groups() const { return weight_.sizes().groups; }

  LinearArgs floats(const Ort::KernelContext& context) const;
  Int8Product int8(const Ort::KernelContext& context) const;

 private:
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

  WeightStore weight_;
  BranchStore branch_;
  std::optional<Int8WeightStore> int8_weight_;
  Int8BranchStore int8_branch_;
  std::vector<float> bias_;
};

}  // namespace rankbook::ort
