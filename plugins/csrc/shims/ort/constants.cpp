#include "shims/ort/constants.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <utility>

#include "contract.h"
#include "kernels/cpu/simd/half.h"

namespace rankbook::ort {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kLargestSize = int64_t{1} << 31;
constexpr size_t kMergedData = 1;  // input of a merged node

const char* type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return "int8";
    default:
      return "another type";
  }
}

int64_t elements(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

// Whether a part, its first byte and then its sizes, lies within so many bytes.
bool lies_within(const Shape& place, int64_t bytes) {
  if (place.size() < 2 || place[0] < 0) return false;
  int64_t left = bytes - place[0];
  for (size_t i = 1; i < place.size(); ++i) {
    if (place[i] < 1) return false;
    left /= place[i];
  }
  return left >= 1;
}

HugeCopy copy_of(const Ort::ConstValue& value, size_t element_size) {
  return HugeCopy::of(value.GetTensorRawData(), value.GetTensorTypeAndShapeInfo().GetElementCount() * element_size);
}

}  // namespace

std::string describe(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

Constants::Constants(const OrtKernelInfo* info, const char* const* names, std::string op_type, int product)
    : info_(info), names_(names), node_(std::move(op_type)), suffix_(product == kAlone ? "" : "_" + std::to_string(product)) {
  node_ += " '" + info_.GetNodeName() + "'";
}

void Constants::fail(const std::string& sentence) const { throw Ort::Exception(node_ + ": " + sentence, ORT_INVALID_ARGUMENT); }

int64_t Constants::attribute(const char* name, int64_t low) const {
  const std::string full = name + suffix_;
  int64_t value = 0;
  try {
    value = info_.GetAttribute<int64_t>(full.c_str());
  } catch (const Ort::Exception&) {
    fail("the integer attribute " + full + " is missing");
  }
  if (value < low || value >= kLargestSize) {
    fail("attribute " + full + " is " + std::to_string(value) + "; it must be at least " + std::to_string(low));
  }
  return value;
}

Ort::ConstValue Constants::tensor(size_t input) const {
  if (suffix_.empty()) return this->input(input, name(input));
  auto found = held_.find(input);
  if (found == held_.end()) found = held_.emplace(input, part(input)).first;
  return found->second.GetConst();
}

Ort::ConstValue Constants::input(size_t position, const std::string& name) const {
  int constant = 0;
  const Ort::ConstValue value = info_.GetTensorConstantInput(position, &constant);
  if (constant == 0 || !static_cast<const OrtValue*>(value)) {
    fail("input " + name + " must be an initializer; export the model again");
  }
  return value;
}

void Constants::drop_data() const {
  if (suffix_.empty()) return;
  const Ort::ConstValue data = input(kMergedData, "data");
  drop_mapped(data.GetTensorRawData(), data.GetTensorTypeAndShapeInfo().GetElementCount());
}

bool Constants::is_attribute(size_t input) const {
  const auto is = [&](const char* part) { return std::strcmp(part, names_[input]) == 0; };
  return !suffix_.empty() && std::none_of(std::begin(contract::kMergedParts), std::end(contract::kMergedParts), is);
}

Place Constants::place(size_t input) const {
  if (suffix_.empty()) return {input, 0};
  return {kMergedData, static_cast<size_t>(info_.GetAttributes<int64_t>(name(input).c_str()).at(0))};
}

// A constant of a merged node: a tensor among the attributes, or a part of the input that holds all.
Ort::Value Constants::part(size_t input) const {
  const std::string full = name(input);
  Shape place;
  try {
    if (is_attribute(input)) return info_.GetTensorAttribute(full.c_str(), Ort::AllocatorWithDefaultOptions());
    place = info_.GetAttributes<int64_t>(full.c_str());
  } catch (const Ort::Exception&) {
    fail("the attribute " + full + " is missing");
  }
  const Ort::ConstValue data = this->input(kMergedData, "data");
  const auto info = data.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) fail("input data is not int8");
  const auto held = static_cast<int64_t>(info.GetElementCount());
  if (!lies_within(place, held)) {
    fail("attribute " + full + " is " + describe(place) + ", which input data of " + std::to_string(held) + " bytes does not hold");
  }
  const Shape sizes(place.begin() + 1, place.end());
  auto* const at = static_cast<uint8_t*>(const_cast<void*>(data.GetTensorRawData())) + place[0];
  return Ort::Value::CreateTensor(data.GetTensorMemoryInfo(), at, static_cast<size_t>(elements(sizes)), sizes.data(), sizes.size(),
                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
}

Shape Constants::shape(size_t input) const { return tensor(input).GetTensorTypeAndShapeInfo().GetShape(); }

std::vector<float> Constants::floats(size_t input) const {
  expect_type(input, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                      ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8});
  const Ort::ConstValue value = tensor(input);
  const auto info = value.GetTensorTypeAndShapeInfo();
  const size_t count = info.GetElementCount();
  const void* data = value.GetTensorRawData();
  std::vector<float> out(count);
  switch (info.GetElementType()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      std::copy_n(static_cast<const float*>(data), count, out.begin());
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      std::copy_n(static_cast<const int8_t*>(data), count, out.begin());
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      for (size_t i = 0; i < count; ++i) out[i] = half_to_float(static_cast<const uint16_t*>(data)[i]);
      break;
    default:
      for (size_t i = 0; i < count; ++i) out[i] = bfloat_to_float(static_cast<const uint16_t*>(data)[i]);
  }
  return out;
}

void Constants::expect_count(size_t inputs) const {
  const size_t actual = info_.GetInputCount();
  if (actual != inputs) fail("it has " + std::to_string(actual) + " inputs; it must have " + std::to_string(inputs));
}

void Constants::expect(size_t input, const std::vector<Shape>& shapes) const {
  const Shape actual = shape(input);
  std::string allowed;
  for (const Shape& candidate : shapes) {
    if (candidate == actual) return;
    allowed += (allowed.empty() ? "" : " or ") + describe(candidate);
  }
  fail("input " + name(input) + " has shape " + describe(actual) + "; it must be " + allowed);
}

void Constants::expect_type(size_t input, const std::vector<ONNXTensorElementDataType>& types) const {
  const auto actual = tensor(input).GetTensorTypeAndShapeInfo().GetElementType();
  std::string allowed;
  for (const auto type : types) {
    if (type == actual) return;
    allowed += std::string(allowed.empty() ? "" : " or ") + type_name(type);
  }
  fail("input " + name(input) + " is " + type_name(actual) + "; it must be " + allowed);
}

WeightStore::WeightStore(const Constants& constants, int bits, size_t codes) : codes_input_(codes), params_input_(codes + 2) {
  weight_.bits = bits;
  weight_.out_features = constants.attribute(contract::kOutFeatures, 1);
  weight_.in_features = constants.attribute(contract::kInFeatures, 1);
  const int64_t offset = constants.attribute(contract::kOffset, 0);
  if (offset > 1) constants.fail("attribute offset is " + std::to_string(offset) + "; it must be 0 or 1");
  weight_.has_offset = offset == 1;

  constants.expect_type(codes, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8});
  constants.expect(codes, {{weight_.panels(), weight_.blocks(), bits, kPanel, 4}});
  // ONNX Runtime casts every fp16 input of a node that stands between nodes without fp16 kernels, constants too.
  constants.expect_type(codes + 1, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
  const Shape levels = constants.shape(codes + 1);
  const int64_t width = int64_t{1} << bits;
  if (levels.size() != 2 || levels[1] != width || levels[0] <= offset || levels[0] > width) {
    constants.fail("input " + constants.name(codes + 1) + " has shape " + describe(levels) + "; it must be (Q, " +
                   std::to_string(width) + ") with Q from " + std::to_string(1 + offset) + " to " + std::to_string(width));
  }
  weight_.planes = static_cast<int>(levels[0] - offset);
  levels_ = constants.floats(codes + 1);
  for (int64_t code = 0; offset == 1 && code < width; ++code) {
    if (levels_[static_cast<size_t>(weight_.planes * width + code)] != 1.0F) {
      constants.fail("attribute offset is 1, but the last row of levels is not all ones");
    }
  }
  read_params(constants);
  fit_lines();
  codes_place_ = constants.place(codes_input_);
  params_place_ = constants.place(params_input_);
  if (check_weight(weight_) != Status::kOk) {
    constants.fail(std::to_string(weight_.groups) + " groups cannot cut rows of " + std::to_string(weight_.in_features) +
                   " inputs: a group must be a multiple of 16 inputs, or the whole row");
  }
}

void WeightStore::read_params(const Constants& constants) {
  const size_t step = params_input_ + 1;
  const size_t base = params_input_ + 2;
  const int64_t planes = weight_.param_planes();
  const bool plain = elements(constants.shape(params_input_)) == 1;
  constants.expect_type(params_input_, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8});
  const Shape full = constants.shape(plain ? step : params_input_);
  if (full.size() != 4 || full[0] != weight_.panels() || full[1] < 1 || full[2] != planes || full[3] != kPanel) {
    constants.fail("input " + constants.name(plain ? step : params_input_) + " has shape " + describe(full) +
                   "; it must be (" + std::to_string(weight_.panels()) + ", groups, " + std::to_string(planes) + ", 32)");
  }
  weight_.groups = full[1];
  if (!plain) {
    const Shape narrow = {weight_.panels(), 1, planes, 1};
    constants.expect(step, {narrow});
    constants.expect(base, {narrow});
    step_ = constants.floats(step);
    base_ = constants.floats(base);
    return;
  }
  constants.expect(base, {{1, 1, 1, 1}});
  constants.expect_type(step, {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16});
  const auto type = constants.tensor(step).GetTensorTypeAndShapeInfo().GetElementType();
  weight_.form = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? ParamForm::kFloat16 : ParamForm::kFloat32;
  weight_.value_scale = constants.floats(params_input_)[0];
  weight_.value_base = constants.floats(base)[0];
  params_input_ = step;
}

// 8-bit codes have 256 levels, too many for registers; where they lie on a line (affine formats), code and slope suffice.
void WeightStore::fit_lines() {
  if (weight_.bits != 8) return;
  std::vector<float> slopes;
  for (int plane = 0; plane < weight_.planes; ++plane) {
    const float* row = levels_.data() + plane * 256;
    const float slope = row[1] - row[0];
    for (int code = 0; code < 256; ++code) {
      if (std::fma(slope, static_cast<float>(code), row[0]) != row[code]) return;
    }
    slopes.insert(slopes.end(), {row[0], slope});
  }
  slopes_ = std::move(slopes);
}

void WeightStore::copy_params(const Constants& constants) {
  const size_t size = weight_.form == ParamForm::kInt8 ? 1 : weight_.form == ParamForm::kFloat16 ? 2 : 4;
  params_ = copy_of(constants.tensor(params_input_), size);
}

void WeightStore::copy_codes(const Constants& constants) { codes_ = copy_of(constants.tensor(codes_input_), 1); }

CodebookWeight WeightStore::bind(const Ort::KernelContext& context) const {
  CodebookWeight weight = weight_;
  const void* codes = codes_.data();
  const void* params = params_.data();
  weight.codes = static_cast<const uint8_t*>(codes != nullptr ? codes : codes_place_.in(context));
  weight.params = params != nullptr ? params : params_place_.in(context);
  weight.levels = levels_.data();
  weight.slopes = slopes_.empty() ? nullptr : slopes_.data();
  weight.step = step_.data();
  weight.base = base_.data();
  return weight;
}

Factors::Factors(const Constants& constants, size_t first, int64_t out_features, int64_t in_features) {
  const auto load = [&](size_t input, int64_t rows, int64_t columns, const Shape& scale) {
    Factor factor;
    constants.expect_type(input, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8});
    const bool plain = constants.shape(input + 1) == Shape{rows, columns} && elements(constants.shape(input)) == 1;
    if (plain) {
      factor.values = constants.floats(input + 1);
      const float unit = constants.floats(input)[0];
      for (float& value : factor.values) value *= unit;
      factor.scales.assign(static_cast<size_t>(rank), 1.0F);
      return factor;
    }
    constants.expect(input, {{rows, columns}, {1, 1}});
    constants.expect(input + 1, {scale});
    const auto* codes = static_cast<const int8_t*>(constants.tensor(input).GetTensorRawData());
    factor.codes.assign(codes, codes + rows * columns);
    drop_mapped(codes, factor.codes.size());
    factor.scales = constants.floats(input + 1);
    return factor;
  };
  const Shape shape = constants.shape(first);
  const Shape scale = constants.shape(first + 1);
  const Shape& full = elements(shape) == 1 && scale.size() == 2 && scale[1] == in_features ? scale : shape;
  if (full.size() != 2 || full[0] < 1 || full[1] != in_features) {
    constants.fail("input " + constants.name(first) + " has shape " + describe(shape) + "; it must be (rank, " +
                   std::to_string(in_features) + ")");
  }
  rank = full[0];
  down = load(first, rank, in_features, {rank, 1});
  up = load(first + 2, out_features, rank, {1, rank});
}

BranchStore::BranchStore(const Factors& factors, int64_t out_features, int64_t in_features)
    : rank_(factors.rank), middle_(static_cast<size_t>(factors.rank)) {
  down_ = {to_panels(factors.down.codes, rank_, in_features), to_panels(factors.down.values, rank_, in_features)};
  up_ = {to_panels(factors.up.codes, out_features, rank_), to_panels(factors.up.values, out_features, rank_)};
  for (size_t i = 0; i < middle_.size(); ++i) middle_[i] = factors.down.scales[i] * factors.up.scales[i];
}

LowRankBranch BranchStore::bind() const { return {rank_, down_.view(), up_.view(), middle_.data()}; }

}  // namespace rankbook::ort
