#pragma once

// Reads the constant inputs of a node into what the kernels take, and says in a sentence what does not fit.

#include <string>
#include <vector>

#include "kernels/codebook.h"
#include "ort/api.h"

namespace rankbook::ort {

// The constant inputs of one node by position. Every check throws Ort::Exception with the node's name in it.
class Constants {
 public:
  Constants(const OrtKernelInfo* info, const char* const* names, std::string op_type);

  int64_t attribute(const char* name, int64_t low) const;
  Ort::ConstValue tensor(size_t input) const;
  std::vector<int64_t> shape(size_t input) const;
  std::vector<float> floats(size_t input) const;  // any of float32, float16, bfloat16, int8
  void expect(size_t input, const std::vector<std::vector<int64_t>>& shapes) const;
  void expect_type(size_t input, const std::vector<ONNXTensorElementDataType>& types) const;
  [[noreturn]] void fail(const std::string& sentence) const;

  const char* name(size_t input) const { return names_[input]; }
  const std::string& node() const { return node_; }

 private:
  Ort::ConstKernelInfo info_;
  const char* const* names_;
  std::string node_;  // "CodebookMatMul3 'model.layers.0.q_proj'"
};

std::string describe(const std::vector<int64_t>& shape);

// A weight whose small parts are owned here; codes and params stay where ONNX Runtime has them.
class WeightStore {
 public:
  // `codes` is the position of that input; levels, params, step and base follow it.
  WeightStore(const Constants& constants, int bits, size_t codes);

  // The weight with its pointers into the inputs of this call.
  CodebookWeight bind(const Ort::KernelContext& context) const;

 private:
  void read_params(const Constants& constants);
  void fit_lines();

  size_t codes_input_;
  size_t params_input_;  // params, or step where that holds the values themselves
  CodebookWeight weight_;
  std::vector<float> levels_, slopes_, step_, base_;
};

// The error branch, its factors brought into panel order: R * (32-padded N + K) bytes, or four times that if not int8.
class BranchStore {
 public:
  BranchStore() = default;
  // `down` is the position of that input; down_scale, up and up_scale follow it.
  BranchStore(const Constants& constants, size_t down, int64_t out_features, int64_t in_features);

  LowRankBranch bind() const;

 private:
  struct Factor {
    std::vector<int8_t> codes;
    std::vector<float> values;
    PanelFactor view() const;
  };

  int64_t rank_ = 0;
  Factor down_, up_;
  std::vector<float> middle_;
};

}  // namespace rankbook::ort
