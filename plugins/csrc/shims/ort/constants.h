#pragma once

// Reads the constant inputs of a node into what the kernels take, and says in a sentence what does not fit.

#include <map>
#include <string>
#include <vector>

#include "kernels/cpu/packed/codebook.h"
#include "shims/ort/api.h"
#include "shims/ort/huge_pages.h"
#include "shims/view.h"

namespace rankbook::ort {

// Where a constant lies: in which input of the node, from which byte on.
struct Place {
  size_t input = 0;
  size_t start = 0;

  const void* in(const Ort::KernelContext& context) const {
    return static_cast<const uint8_t*>(context.GetInput(input).GetTensorRawData()) + start;
  }
};

// Which product of a node: its only one, one of a merged node (plugins/merged.py), or that of one expert, whose constants are
// slices of the node's, which stand behind one more input (plugins/experts.py).
struct Which {
  enum Kind { kAlone, kMerged, kExpert };
  Kind kind = kAlone;
  int64_t index = 0;

  size_t position(size_t input) const { return input + (kind == kExpert ? 1 : 0); }
};

// The constants of one product by their position among the inputs of an operator of one product, wherever they lie in the
// node. Every check throws Ort::Exception with the node's name in it.
class Constants {
 public:
  // `names` are those of the inputs of an operator of one product. With the context of a call the constants are the inputs
  // of that call.
  Constants(const OrtKernelInfo* info, const char* const* names, std::string op_type, Which which = {},
            const Ort::KernelContext* context = nullptr);

  // Whether levels are float32 and not known before a call: what ONNX Runtime makes of a node's fp16 constants, with Cast
  // nodes that it only folds where graph optimizations are on.
  static bool are_cast(const OrtKernelInfo* info, Which which = {});

  // Fails where the node has another number of inputs, or leaves out one of them or an output.
  void expect_inputs(size_t count) const;
  // Fails where the node's input at this position is of another type.
  void expect_type(size_t position, const char* name, contract::Type type) const;
  int64_t attribute(const char* name, int64_t low) const;
  float float_attribute(const char* name) const;  // finite, not negative

  // The layer that the first `inputs` of an operator of one product describe; of stacked ones each, and their number.
  Layer layer(int bits, size_t inputs, const Limits& limits, int64_t* experts = nullptr) const;
  // Fails at NaN, infinity, and placeholders that hold something else; looks at what is in this process' memory alone
  // where `on_gpu`.
  void check_elements(const Layer& layer, bool on_gpu) const;

  Ort::ConstValue tensor(size_t input) const;
  Constant constant(size_t input) const;
  std::vector<float> floats(size_t input) const;  // of float32 or float16
  [[noreturn]] void fail(const std::string& sentence) const;

  // Gives the pages of tensors that products share back, once nothing reads them: pages that two parts share, and those that
  // the system brought along, are still there.
  void drop_data() const;

  bool is_attribute(size_t input) const;  // and has no place
  Place place(size_t input) const;
  const std::string& node() const { return node_; }

 private:
  int64_t integer(const char* name) const;
  std::string name(size_t input) const { return names_[input] + suffix_; }
  Ort::ConstValue input(size_t position, const std::string& name) const;
  Ort::ConstValue whole(size_t input) const { return this->input(which_.position(input), name(input)); }
  Ort::Value part(size_t input) const;
  Ort::Value slice(size_t input) const;

  Ort::ConstKernelInfo info_;
  const char* const* names_;
  std::string node_;  // "CodebookMatMul3 'model.layers.0.q_proj'"
  std::string suffix_;
  Which which_;
  const Ort::KernelContext* context_;
  mutable std::map<size_t, Ort::Value> held_;  // parts of what products share
};

Shape shape_of(const Ort::TensorTypeAndShapeInfo& info);
inline Shape shape_of(const Ort::ConstValue& value) { return shape_of(value.GetTensorTypeAndShapeInfo()); }

// A weight whose small parts are owned here. Codes and params stay where ONNX Runtime has them, or are copied once.
class WeightStore {
 public:
  WeightStore(const Constants& constants, const Layer& layer);

  // Copies one of them to huge pages, where there are any.
  void copy_params(const Constants& constants);
  void copy_codes(const Constants& constants);
  bool copied() const { return codes_.data() != nullptr; }

  // The weight with its pointers into the copies, or into the inputs of this call.
  CodebookWeight bind(const Ort::KernelContext& context) const;

  const CodebookWeight& sizes() const { return weight_; }  // without pointers
  const std::vector<float>& levels() const { return levels_; }
  const std::vector<float>& step() const { return step_; }
  const std::vector<float>& base() const { return base_; }

 private:
  void fit_lines();

  size_t params_input_;  // params, or step where that holds the values themselves
  Place codes_place_, params_place_;
  CodebookWeight weight_;
  std::vector<float> levels_, slopes_, step_, base_;
  std::vector<uint8_t> held_params_;  // of a merged node that has them as an attribute, which ends with its creation
  HugeCopy codes_, params_;
};

// One factor of the error branch as the file has it, (rows, columns): codes with scales, or values with scales of one.
struct Factor {
  std::vector<int8_t> codes;
  std::vector<float> values;
  std::vector<float> scales;  // one per rank
};

struct Factors {
  Factor down, up;
  Factors(const Constants& constants, const Layer& layer);
};

// (rows, columns) to (ceil(rows / 32), columns, 32), zero-padded.
template <class T>
std::vector<T> to_panels(const std::vector<T>& from, int64_t rows, int64_t columns) {
  std::vector<T> out(static_cast<size_t>(from.empty() ? 0 : ceil_div(rows, kPanel) * columns * kPanel));
  for (int64_t row = 0; row < rows && !from.empty(); ++row) {
    T* to = out.data() + row / kPanel * columns * kPanel + row % kPanel;
    for (int64_t column = 0; column < columns; ++column) to[column * kPanel] = from[static_cast<size_t>(row * columns + column)];
  }
  return out;
}

// A factor in panel order.
struct StoredFactor {
  std::vector<int8_t> codes;
  std::vector<float> values;
  PanelFactor view() const {
    return codes.empty() ? PanelFactor{nullptr, values.data()} : PanelFactor{codes.data(), nullptr};
  }
};

// The error branch, its factors brought into panel order: R * (32-padded N + K) bytes, or four times that if not int8.
class BranchStore {
 public:
  BranchStore() = default;
  BranchStore(const Factors& factors, const Layer& layer);

  LowRankBranch bind() const;

 private:
  int64_t rank_ = 0;
  StoredFactor down_, up_;
  std::vector<float> middle_;
};

}  // namespace rankbook::ort
