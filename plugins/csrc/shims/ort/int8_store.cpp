// What the int8 mode makes of a layer when its node is created: tables of whole-numbered levels, steps and bases with
// the units of these levels, the error branch as an 8-bit weight.
//
// Layouts are those of kernels/cpu/int8/int8.h. The definition, to the last bit, is plugins/int8.py; called by
// product.cpp.
#include "shims/ort/int8_store.h"

#include <cstring>
#include <mutex>
#include <string>

namespace rankbook::ort {
namespace {

// What an exact plane has for step and base.
const float kOne = 1.0F;
const float kZero = 0.0F;

// int8 (rows, columns) as 8-bit codes (panels, blocks, 8, 32, 4); an int8 is the carrier of its code.
// The first factor becomes a packed weight of 8 bits whose codes are its elements: the loops for 8 bits serve it, with
// nothing to look up (`straight`).
std::vector<uint8_t> to_words(const std::vector<int8_t>& from, int64_t rows, int64_t columns) {
  const int64_t blocks = ceil_div(columns, kBlock);
  std::vector<uint8_t> out(static_cast<size_t>(ceil_div(rows, kPanel) * blocks * kBlock * kPanel));
  for (int64_t row = 0; row < rows; ++row) {
    // (panels, blocks, 8 words of four inputs, 32 rows, 4): the 8-bit form of plugins/layout.py.
    uint8_t* to = out.data() + row / kPanel * blocks * kBlock * kPanel + row % kPanel * 4;
    for (int64_t k = 0; k < columns; ++k) to[k / 4 * kWordBytes + k % 4] = static_cast<uint8_t>(from[static_cast<size_t>(row * columns + k)]);
  }
  return out;
}

// Ones are the same for every branch: few arrays serve all of them, and stay in the cache.
// 8 KB a layer of 4,096 inputs and groups of 64 would otherwise be read beside the factors.
std::shared_ptr<const std::vector<float>> shared_ones(size_t count) {
  // Sessions are created side by side.
  static std::mutex mutex;
  static std::shared_ptr<const std::vector<float>> held;
  const std::lock_guard<std::mutex> lock(mutex);
  if (held == nullptr || held->size() < count) held = std::make_shared<const std::vector<float>>(count, 1.0F);
  return held;
}

// Code c stands for c - 128, the carrier of the format.
void straight_levels(int32_t* levels) {
  for (int code = 0; code < 256; ++code) levels[code] = code - 128;
}

// All factors have this table.
// 256 bytes twice, for the lifetime of the library.
const PlaneTable* straight_table(bool is_signed) {
  const auto make = [](bool with_sign) {
    int32_t levels[256];
    straight_levels(levels);
    return prepare_table(levels, 8, with_sign);
  };
  static const PlaneTable tables[] = {make(false), make(true)};
  return &tables[is_signed ? 1 : 0];
}

template <class T>
HugeCopy copy_of(const std::vector<T>& from) {
  return HugeCopy::of(from.data(), from.size() * sizeof(T));
}

template <class T>
const T* data_of(const HugeCopy& copy, const std::vector<T>& original) {
  return copy.data() == nullptr ? original.data() : static_cast<const T*>(copy.data());
}

}  // namespace

// All planes are signed if one has to be: the loops choose by layer.
Int8WeightStore::Int8WeightStore(const Constants& constants, const WeightStore& store, const Int8Kernels& kernels) {
  const CodebookWeight& weight = store.sizes();
  // 255 * 127 * 65536 is the last sum that 32 bits hold.
  const int64_t group = weight.in_features / weight.groups;
  if (group > kLargestGroup) {
    constants.fail("groups of " + std::to_string(group) + " inputs are too long for int8 activations; the longest is " +
                   std::to_string(kLargestGroup) + ": export with --activations float, use rankbook.activations = fp32");
  }
  const int width = 1 << weight.bits;
  std::vector<int32_t> levels(static_cast<size_t>(weight.planes * width));
  std::vector<float> units;
  for (int plane = 0; plane < weight.planes; ++plane) {
    int32_t* row = levels.data() + plane * width;
    // 1 where levels are whole already: their products are exact.
    units.push_back(whole_levels(store.levels().data() + plane * width, width, row));
    is_signed_ = is_signed_ || needs_signed(row, width, kernels);
  }
  for (int plane = 0; plane < weight.planes; ++plane) {
    // After all planes were looked at, for is_signed_ is one for the layer.
    tables_.push_back(prepare_table(levels.data() + plane * width, weight.bits, is_signed_));
  }
  // The offset's level is one, by definition.
  if (weight.has_offset) units.push_back(1.0F);
  // Step and base take the unit of the whole-numbered levels here, once, instead of a multiplication for each group.
  per_panel_ = weight.form == ParamForm::kInt8;
  step_ = per_panel_ ? store.step() : std::vector<float>(units.size(), 1.0F);
  base_ = per_panel_ ? store.base() : std::vector<float>(units.size(), 0.0F);
  for (size_t i = 0; i < step_.size(); ++i) {
    step_[i] *= units[i % units.size()];
    base_[i] *= units[i % units.size()];
  }
}

// Small things too: what is read for every panel should not be walked to through 4 KB pages.
void Int8WeightStore::copy() {
  tables_copy_ = copy_of(tables_);
  step_copy_ = copy_of(step_);
  base_copy_ = copy_of(base_);
}

Int8Weight Int8WeightStore::bind(const CodebookWeight& weight) const {
  return {weight, data_of(tables_copy_, tables_), is_signed_, data_of(step_copy_, step_), data_of(base_copy_, base_), per_panel_};
}

// Groups are those of the weight, so that the activations that were rounded for it serve the branch as well; the
// parameters are ones, shared by all layers.
Int8BranchStore::Int8BranchStore(const Factors& factors, const Layer& layer, const Int8Kernels& kernels)
    : middle_(static_cast<size_t>(layer.rank)) {
  const int64_t rank = layer.rank;
  const int64_t k = layer.columns;
  down_.bits = 8;
  down_.out_features = rank;
  down_.in_features = k;
  down_.groups = layer.groups;
  down_.planes = 1;
  // Ones in fp32, which the loops read without a conversion.
  down_.form = ParamForm::kFloat32;
  std::vector<int8_t> codes = factors.down.codes;
  std::vector<float> scales = factors.down.scales;
  // Factors stored as floats are rounded to int8 a rank at a time, as plugins/int8.py defines.
  if (codes.empty()) {
    codes.resize(factors.down.values.size());
    for (int64_t row = 0; row < rank; ++row) {
      scales[static_cast<size_t>(row)] = round_row(factors.down.values.data() + row * k, k, codes.data() + row * k);
    }
  }
  codes_ = to_words(codes, rank, k);
  ones_ = shared_ones(static_cast<size_t>(down_.panels() * down_.groups * kPanel));
  int32_t levels[256];
  straight_levels(levels);
  is_signed_ = needs_signed(levels, 256, kernels);
  table_ = straight_table(is_signed_);
  up_ = {to_panels(factors.up.codes, layer.rows, rank), to_panels(factors.up.values, layer.rows, rank)};
  // Both scales in one number a rank, applied between the halves of the branch.
  for (size_t i = 0; i < middle_.size(); ++i) middle_[i] = scales[i] * factors.up.scales[i];
}

// The order of copies is decided in Product::copy.
void Int8BranchStore::copy_down() {
  down_copy_ = copy_of(codes_);
  if (down_copy_.data() != nullptr) std::vector<uint8_t>().swap(codes_);  // `= {}` would keep the memory
}

void Int8BranchStore::copy_up() {
  up_copy_ = copy_of(up_.codes);
  if (up_copy_.data() != nullptr) std::vector<int8_t>().swap(up_.codes);
}

void Int8BranchStore::copy_middle() { middle_copy_ = copy_of(middle_); }

// Independent of the call: all that it points to is owned here.
Int8Branch Int8BranchStore::bind() const {
  Int8Branch branch;
  branch.rank = static_cast<int64_t>(middle_.size());
  if (branch.rank == 0) return branch;
  branch.down = {down_, table_, is_signed_, &kOne, &kZero, false};
  branch.down.weight.codes = codes_.empty() ? static_cast<const uint8_t*>(down_copy_.data()) : codes_.data();
  branch.down.weight.params = ones_->data();
  branch.up = up_.view();
  if (up_copy_.data() != nullptr) branch.up = {static_cast<const int8_t*>(up_copy_.data()), nullptr};
  branch.middle = data_of(middle_copy_, middle_);
  return branch;
}

}  // namespace rankbook::ort
