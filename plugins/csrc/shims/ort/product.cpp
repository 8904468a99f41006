#include "shims/ort/product.h"

#include "contract.h"

namespace rankbook::ort {
namespace {

using LowRank = contract::CodebookMatMulLowRank;  // its inputs are those of the others, and more

static_assert(contract::CodebookMatMul::kBias == static_cast<int>(LowRank::kBias));

}  // namespace

Product::Product(const Constants& constants, int bits, bool low_rank, const Kernels& kernels)
    : weight_(constants, bits, LowRank::kCodes) {
  read_bias(constants);
  if (kernels.rounds) int8_weight_.emplace(constants, weight_, kernels.int8);
  if (low_rank) read_branch(constants, kernels);
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

void Product::read_bias(const Constants& constants) {
  constants.expect(LowRank::kBias, {{out_features()}, {1}});
  bias_ = constants.floats(LowRank::kBias);
  if (bias_.size() != 1 || out_features() == 1) return;
  const float value = bias_[0];
  if (value == 0.0F) {
    bias_.clear();
  } else {
    bias_.assign(static_cast<size_t>(out_features()), value);
  }
}

void Product::read_branch(const Constants& constants, const Kernels& kernels) {
  const Factors factors(constants, LowRank::kDown, out_features(), in_features());
  if (kernels.rounds) {
    int8_branch_ = Int8BranchStore(factors, weight_.sizes(), kernels.int8);
  } else {
    branch_ = BranchStore(factors, out_features(), in_features());
  }
}

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
