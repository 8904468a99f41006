#pragma once

// What the int8 mode keeps of a node beside its inputs: tables of whole-numbered levels, scales, factors of the branch.

#include <memory>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "shims/ort/constants.h"

namespace rankbook::ort {

class Int8WeightStore {
 public:
  Int8WeightStore(const Constants& constants, const WeightStore& weight, const Int8Kernels& kernels);

  // Copies everything to huge pages, where there are any.
  void copy();

  // `weight` bound to the inputs of this call, with the tables beside it.
  Int8Weight bind(const CodebookWeight& weight) const;

 private:
  std::vector<PlaneTable> tables_;
  std::vector<float> step_, base_;
  HugeCopy tables_copy_, step_copy_, base_copy_;
  bool is_signed_ = false;
  bool per_panel_ = false;
};

// Factors as 8-bit weights: rank * (32-padded N + K) bytes, four times that for the second factor if it is not int8.
class Int8BranchStore {
 public:
  Int8BranchStore() = default;
  Int8BranchStore(const Factors& factors, const Layer& layer, const Int8Kernels& kernels);

  // Moves an int8 factor to huge pages, where there are any; or copies the scales between the two.
  void copy_down();
  void copy_middle();
  void copy_up();

  Int8Branch bind() const;

 private:
  CodebookWeight down_;
  std::vector<uint8_t> codes_;  // empty where there is a copy
  HugeCopy down_copy_, up_copy_, middle_copy_;
  std::shared_ptr<const std::vector<float>> ones_;  // parameters of down, (RP, G, 1, 32)
  const PlaneTable* table_ = nullptr;
  bool is_signed_ = false;
  StoredFactor up_;
  std::vector<float> middle_;
};

}  // namespace rankbook::ort
