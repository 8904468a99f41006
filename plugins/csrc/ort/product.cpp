#include "ort/product.h"

#include "contract.h"

namespace rankbook::ort {
namespace {

using LowRank = contract::CodebookMatMulLowRank;  // its inputs are those of the others, and more

static_assert(contract::CodebookMatMul::kBias == static_cast<int>(LowRank::kBias));

}  // namespace

Product::Product(const Constants& constants, int bits, bool low_rank, const Kernels& kernels)
    : weight_(constants, bits, LowRank::kCodes) {
  read_bias(constants);
  if (kernels.rounds) integer_weight_.emplace(constants, weight_, kernels.integers);
  if (kernels.rounds && kernels.copy) integer_weight_->copy();
  if (low_rank) read_branch(constants, kernels);
  if (kernels.copy) weight_.copy(constants);  // last: what lies behind the codes is then the next product
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
    integer_branch_ = IntegerBranchStore(factors, weight_.sizes(), kernels.integers);
    if (kernels.copy) integer_branch_.copy();
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

IntegerProduct Product::integers(const Ort::KernelContext& context) const {
  return {integer_weight_->bind(weight_.bind(context)), integer_branch_.bind(), bias(), nullptr};
}

}  // namespace rankbook::ort
