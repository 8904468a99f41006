// One product of a node, from its constants to the kernels' structures, for either mode of the session. Called by
// ops.cpp.
#include "shims/ort/product.h"

namespace rankbook::ort {

// Either mode keeps its own form of the branch; the weight's codes serve both.
Product::Product(const Constants& constants, const Layer& layer, const Kernels& kernels) : weight_(constants, layer) {
  if (layer.has_bias()) bias_ = constants.floats(Port::kBias);
  if (kernels.rounds) int8_weight_.emplace(constants, weight_, kernels.int8);
  if (layer.rank == 0) return;
  const Factors factors(constants, layer);
  if (kernels.rounds) {
    int8_branch_ = Int8BranchStore(factors, layer, kernels.int8);
  } else {
    branch_ = BranchStore(factors, layer);
  }
}

// In the order in which a token reads them, all products of a node together: the loops over codes prefetch some KB beyond
// their end, which then are what comes next. Parameters and second factors, read beside the codes, do not come between
// them; first factors reach into the parameters.
void Product::copy(std::vector<Product>& products, const std::vector<Constants>& constants) {
  for (Product& each : products) {
    if (each.int8_weight_) each.int8_weight_->copy();
    each.int8_branch_.copy_middle();
  }
  for (Product& each : products) each.int8_branch_.copy_down();
  for (size_t i = 0; i < products.size(); ++i) products[i].weight_.copy_params(constants[i]);
  for (Product& each : products) each.int8_branch_.copy_up();
  for (size_t i = 0; i < products.size(); ++i) products[i].weight_.copy_codes(constants[i]);
  if (products[0].weight_.copied()) constants[0].drop_data();
}

// Structures of pointers, bound to the inputs of this call; nothing is copied.
LinearArgs Product::floats(const Ort::KernelContext& context) const {
  LinearArgs args;
  args.weight = weight_.bind(context);
  args.branch = branch_.bind();
  args.bias = bias();
  return args;
}

Int8Product Product::int8(const Ort::KernelContext& context) const {
  return {int8_weight_->bind(weight_.bind(context)), int8_branch_.bind(), bias(), nullptr};
}

}  // namespace rankbook::ort
