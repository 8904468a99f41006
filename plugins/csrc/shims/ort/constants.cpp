// Reads the constants of a node for ONNX Runtime: tensors among its inputs, or, in a node of several products, parts of
// one int8 input and attributes. Everything is checked when the node is created; a call only binds addresses.
//
// Constants come in the forms of plugins/forms.py. What is small is copied (levels, steps, bases, bias, scales); codes
// and parameters stay where ONNX Runtime has them, in the mapped file most of the time, until Product::copy brings them
// to huge pages.
//
// Called by ops.cpp, and by cuda_ops.cpp for the layer's sizes and the places of its constants.
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

// Inputs of a merged node are x and one int8 tensor that holds the large parts of all its products; the small ones are
// attributes. With an initializer for every constant SmolLM2-135M took 3 MB more.
constexpr size_t kMergedData = 1;  // input of a merged node

using Names = contract::CodebookMatMul;  // every kind has its attributes
using Numbers = std::vector<int64_t>;

// Types that no constant may have are one: the sentence names what is allowed.
contract::Type type_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return contract::Type::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return contract::Type::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return contract::Type::kBfloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return contract::Type::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return contract::Type::kInt32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return contract::Type::kInt64;
    default:
      return contract::Type::kOther;
  }
}

// Sizes have been looked at by lies_within before.
int64_t elements(const Numbers& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::string describe(const Numbers& numbers) {
  std::string text = "(";
  for (size_t i = 0; i < numbers.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + ")";
}

// Whether a part, its first byte and then its sizes, lies within so many bytes.
// Division and not multiplication: sizes from a file may overflow a product.
bool lies_within(const Numbers& place, int64_t bytes) {
  if (place.size() < 2 || place[0] < 0) return false;
  int64_t left = bytes - place[0];
  for (size_t i = 1; i < place.size(); ++i) {
    if (place[i] < 1) return false;
    left /= place[i];
  }
  return left >= 1;
}

// Of the types that constants may have.
size_t bytes_of(const Ort::ConstValue& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  const contract::Type type = type_of(info.GetElementType());
  return info.GetElementCount() * (type == contract::Type::kInt8 ? 1 : type == contract::Type::kFloat32 ? 4 : 2);
}

HugeCopy copy_of(const Ort::ConstValue& value) { return HugeCopy::of(value.GetTensorRawData(), bytes_of(value)); }

}  // namespace

// Into fixed memory: GetShape() would allocate for every input of every call.
Shape shape_of(const Ort::TensorTypeAndShapeInfo& info) {
  Shape out;
  out.axes = info.GetDimensionsCount();
  if (out.axes <= Shape::kMostAxes) Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, out.at.data(), out.axes));
  return out;
}

// Sentences begin with the operator and the node's name, which Netron shows as well.
Constants::Constants(const OrtKernelInfo* info, const char* const* names, std::string op_type, Which which,
                     const Ort::KernelContext* context)
    : info_(info),
      names_(names),
      node_(std::move(op_type)),
      suffix_(which.kind == Which::kMerged ? "_" + std::to_string(which.index) : ""),
      which_(which),
      context_(context) {
  node_ += " '" + info_.GetNodeName() + "'";
}

bool Constants::are_cast(const OrtKernelInfo* info, Which which) {
  const Ort::ConstKernelInfo node(info);
  const size_t levels = which.position(Port::kLevels);
  if (node.GetInputCount() <= levels) return false;
  int constant = 0;
  node.GetTensorConstantInput(levels, &constant);
  const auto type = node.GetInputTypeInfo(levels).GetTensorTypeAndShapeInfo().GetElementType();
  return constant == 0 && type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

// INVALID_ARGUMENT, which ONNX Runtime hands to Python as an exception of its own kind.
void Constants::fail(const std::string& sentence) const { throw Ort::Exception(node_ + ": " + sentence, ORT_INVALID_ARGUMENT); }

// ONNX Runtime reports a missing attribute without the node; hence the catch.
int64_t Constants::integer(const char* name) const {
  const std::string full = name + suffix_;
  try {
    return info_.GetAttribute<int64_t>(full.c_str());
  } catch (const Ort::Exception&) {
    fail("the integer attribute " + full + " is missing");
  }
}

// For attributes of attention, whose upper ends are the sizes of tensors.
int64_t Constants::attribute(const char* name, int64_t low) const {
  const int64_t value = integer(name);
  if (value < low || value > contract::kLargestSize) {
    fail("attribute " + (name + suffix_) + " is " + std::to_string(value) + "; it must be at least " + std::to_string(low));
  }
  return value;
}

// Negated, so that NaN is refused as well.
float Constants::float_attribute(const char* name) const {
  float value = 0.0F;
  try {
    value = info_.GetAttribute<float>(name);
  } catch (const Ort::Exception&) {
    fail(std::string("the float attribute ") + name + " is missing");
  }
  if (!(value >= 0.0F) || std::isinf(value)) {
    fail(std::string("attribute ") + name + " is " + std::to_string(value) + "; it must be 0 or a positive number");
  }
  return value;
}

// ONNX lets a node leave out what is optional; custom operators declare variadic and optional inputs, so nothing else looks.
void Constants::expect_inputs(size_t count) const {
  const size_t actual = info_.GetInputCount();
  if (actual != count) fail("it has " + std::to_string(actual) + " inputs; it must have " + std::to_string(count));
  for (size_t i = 0; i < count; ++i) {
    if (info_.GetInputName(i).empty()) fail("input number " + std::to_string(i) + " is left out; the node needs all " + std::to_string(count));
  }
  for (size_t i = 0; i < info_.GetOutputCount(); ++i) {
    if (info_.GetOutputName(i).empty()) fail("output number " + std::to_string(i) + " is left out; the node writes all of them");
  }
}

void Constants::expect_type(size_t position, const char* name, contract::Type type) const {
  const contract::Type given = type_of(info_.GetInputTypeInfo(position).GetTensorTypeAndShapeInfo().GetElementType());
  const auto text = [](contract::Type of) { return std::string(contract::kTypes[static_cast<int>(of)]); };
  if (given != type) fail(std::string("input ") + name + " is " + text(given) + "; it must be " + text(type));
}

// From types and shapes to a layer: view.cpp decides, for all runtimes alike; here only ONNX Runtime's own habit is
// undone.
Layer Constants::layer(int bits, size_t inputs, const Limits& limits, int64_t* experts) const {
  const LayerAttributes attributes{bits, integer(Names::kOutFeatures), integer(Names::kInFeatures), integer(Names::kOffset)};
  Constant constants[Port::kInputCount];
  for (size_t i = 1; i < inputs; ++i) constants[i] = constant(i);
  if (experts != nullptr) {
    if (const std::string problem = unstack(constants, inputs, experts); !problem.empty()) fail(problem);
  }
  // ONNX Runtime casts every fp16 input of a node that stands between nodes without fp16 kernels, constants too: parameters
  // and factors then have another form of the table.
  contract::Type& levels = constants[Port::kLevels].type;
  if (limits.casts && levels == contract::Type::kFloat32) levels = contract::Type::kFloat16;
  Layer out;
  if (const std::string problem = read_layer(attributes, constants, inputs, limits, suffix_, &out); !problem.empty()) fail(problem);
  return out;
}

// On a GPU only attributes are in this memory; initializers are already on the device, where a look at them would cost
// a copy.
void Constants::check_elements(const Layer& layer, bool on_gpu) const {
  layer.each([&](const contract::Stored& stored) {
    const auto input = static_cast<size_t>(stored.input);
    if (on_gpu && !is_attribute(input)) return;
    const Ort::ConstValue value = tensor(input);
    const auto info = value.GetTensorTypeAndShapeInfo();
    const auto count = static_cast<int64_t>(info.GetElementCount());
    const contract::Type type = type_of(info.GetElementType());
    const std::string problem = rankbook::check_elements(stored, type, value.GetTensorRawData(), count, suffix_);
    if (!problem.empty()) fail(problem);
  });
}

// Parts of what products share are made into tensors once and kept, as several readers ask for them.
Ort::ConstValue Constants::tensor(size_t input) const {
  if (which_.kind == Which::kAlone) return whole(input);
  auto found = held_.find(input);
  // A map and not an array: most constants are asked for once.
  if (found == held_.end()) found = held_.emplace(input, which_.kind == Which::kMerged ? part(input) : slice(input)).first;
  return found->second.GetConst();
}

// Constants must be known when the node is created, since tables are made of them; an input that another node computes
// has no value yet. Where ONNX Runtime casts them they are read in the first call.
Ort::ConstValue Constants::input(size_t position, const std::string& name) const {
  if (context_ != nullptr) return context_->GetInput(position);
  int constant = 0;
  const Ort::ConstValue value = info_.GetTensorConstantInput(position, &constant);
  if (constant == 0 || !static_cast<const OrtValue*>(value)) {
    fail("input " + name + " must be an initializer; export the model again");
  }
  return value;
}

// After the copies to huge pages: the file's pages would otherwise count for the process until memory runs short.
void Constants::drop_data() const {
  const auto drop = [](const Ort::ConstValue& data) { drop_mapped(data.GetTensorRawData(), bytes_of(data)); };
  if (which_.kind == Which::kMerged) drop(input(kMergedData, "data"));
  if (which_.kind != Which::kExpert) return;
  for (const size_t large : {Port::kCodes, Port::kParams}) drop(whole(large));
}

// By contract.kMergedParts, the list of what lies in the shared tensor.
bool Constants::is_attribute(size_t input) const {
  // Names without the suffix of the product.
  const auto is = [&](const char* part) { return std::strcmp(part, names_[input]) == 0; };
  return !suffix_.empty() && std::none_of(std::begin(contract::kMergedParts), std::end(contract::kMergedParts), is);
}

// An offset and not an address: the input's memory may be another one in every call.
Place Constants::place(size_t input) const {
  if (which_.kind == Which::kAlone) return {input, 0};
  if (which_.kind == Which::kExpert) return {which_.position(input), static_cast<size_t>(which_.index) * bytes_of(tensor(input))};
  return {kMergedData, static_cast<size_t>(info_.GetAttributes<int64_t>(name(input).c_str()).at(0))};
}

// A constant of a merged node: a tensor among the attributes, or a part of the input that holds all.
// A tensor over memory that is not its own: the input lives as long as the session, and nothing is copied.
Ort::Value Constants::part(size_t input) const {
  const std::string full = name(input);
  Numbers place;
  try {
    if (is_attribute(input)) return info_.GetTensorAttribute(full.c_str(), Ort::AllocatorWithDefaultOptions());
    place = info_.GetAttributes<int64_t>(full.c_str());
  } catch (const Ort::Exception&) {
    fail("the attribute " + full + " is missing");
  }
  const Ort::ConstValue data = this->input(kMergedData, "data");
  const auto info = data.GetTensorTypeAndShapeInfo();
  // Every part in it is int8: codes are bytes less 128, parameters and factors are int8 already.
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) fail("input data is not int8");
  const auto held = static_cast<int64_t>(info.GetElementCount());
  if (!lies_within(place, held)) {
    fail("attribute " + full + " is " + describe(place) + ", which input data of " + std::to_string(held) + " bytes does not hold");
  }
  // The rest of an attribute are the sizes of the part; view.cpp checks them as it does those of a tensor.
  const Numbers sizes(place.begin() + 1, place.end());
  auto* const at = static_cast<uint8_t*>(const_cast<void*>(data.GetTensorRawData())) + place[0];
  return Ort::Value::CreateTensor(data.GetTensorMemoryInfo(), at, static_cast<size_t>(elements(sizes)), sizes.data(), sizes.size(),
                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
}

// The part of one expert. Its sizes are those of the constant without the first.
Ort::Value Constants::slice(size_t input) const {
  const Ort::ConstValue all = whole(input);
  const auto info = all.GetTensorTypeAndShapeInfo();
  const Numbers shape = info.GetShape();
  const size_t bytes = bytes_of(all) / static_cast<size_t>(shape.at(0));
  auto* const at = static_cast<uint8_t*>(const_cast<void*>(all.GetTensorRawData())) + static_cast<size_t>(which_.index) * bytes;
  return Ort::Value::CreateTensor(all.GetTensorMemoryInfo(), at, bytes, shape.data() + 1, shape.size() - 1, info.GetElementType());
}

// What view.cpp wants to know of a constant, of all experts together; its elements are looked at later.
Constant Constants::constant(size_t input) const {
  const Ort::ConstValue value = which_.kind == Which::kExpert ? whole(input) : tensor(input);
  return {type_of(value.GetTensorTypeAndShapeInfo().GetElementType()), shape_of(value)};
}

// fp16 constants are widened once, when the node is created, and not in every call.
std::vector<float> Constants::floats(size_t input) const {
  const Ort::ConstValue value = tensor(input);
  const auto info = value.GetTensorTypeAndShapeInfo();
  const size_t count = info.GetElementCount();
  const void* data = value.GetTensorRawData();
  std::vector<float> out(count);
  if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    // A copy even of fp32: the file's page may go.
    std::copy_n(static_cast<const float*>(data), count, out.begin());
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = half_to_float(static_cast<const uint16_t*>(data)[i]);
  }
  return out;
}

// Small constants are copied and owned; codes and parameters, nearly all of the bytes, stay where they are or go to
// huge pages.
WeightStore::WeightStore(const Constants& constants, const Layer& layer)
    : params_input_(layer.param_bits() == 8 ? Port::kParams : Port::kStep) {
  constants.check_elements(layer, false);
  // Everything that does not depend on the call.
  weight_.bits = layer.bits;
  weight_.has_offset = layer.has_offset;
  weight_.out_features = layer.rows;
  weight_.in_features = layer.columns;
  weight_.groups = layer.groups;
  weight_.planes = static_cast<int>(layer.planes());
  levels_ = constants.floats(Port::kLevels);
  const int64_t width = int64_t{1} << layer.bits;
  // The kernels add the offset without a look-up, so its row must be what they take it for.
  for (int64_t code = 0; layer.has_offset && code < width; ++code) {
    if (levels_[static_cast<size_t>(weight_.planes * width + code)] != 1.0F) {
      constants.fail("attribute offset is 1, but the last row of levels is not all ones");
    }
  }
  // A step and a base for each panel and plane; other forms hold the values themselves.
  if (layer.param_bits() == 8) {
    step_ = constants.floats(Port::kStep);
    base_ = constants.floats(Port::kBase);
  } else {
    // fp16 parameters are widened in registers, where they are used.
    weight_.form = layer.param_bits() == 16 ? ParamForm::kFloat16 : ParamForm::kFloat32;
  }
  fit_lines();
  codes_place_ = constants.place(Port::kCodes);
  if (!constants.is_attribute(params_input_)) {
    params_place_ = constants.place(params_input_);
    return;
  }
  const Ort::ConstValue values = constants.tensor(params_input_);
  const auto* bytes = static_cast<const uint8_t*>(values.GetTensorRawData());
  const size_t size = values.GetTensorTypeAndShapeInfo().GetElementCount() * static_cast<size_t>(layer.param_bits() / 8);
  // fp16 or fp32 parameters of a merged node are an attribute, which nobody maps: kept here.
  held_params_.assign(bytes, bytes + size);
}

// 8-bit codes have 256 levels, too many for registers; where they lie on a line (affine formats), code and slope suffice.
// Fused as the kernels compute it, so that a line is taken only where it gives every level exactly.
void WeightStore::fit_lines() {
  // Up to 4 bits all levels of a plane are in registers anyway.
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

// Swapped with an empty vector, since clear() keeps the memory.
void WeightStore::copy_params(const Constants& constants) {
  params_ = copy_of(constants.tensor(params_input_));
  if (params_.data() != nullptr) std::vector<uint8_t>().swap(held_params_);
}

// Last of all copies of a node: codes are nearly all of the bytes, and lie in the order in which panels are read.
void WeightStore::copy_codes(const Constants& constants) { codes_ = copy_of(constants.tensor(Port::kCodes)); }

// Per call, because ONNX Runtime may give the inputs of a call another address; copies win over both.
CodebookWeight WeightStore::bind(const Ort::KernelContext& context) const {
  CodebookWeight weight = weight_;
  const void* codes = codes_.data();
  const void* params = params_.data();
  weight.codes = static_cast<const uint8_t*>(codes != nullptr ? codes : codes_place_.in(context));
  if (params == nullptr && !held_params_.empty()) params = held_params_.data();
  weight.params = params != nullptr ? params : params_place_.in(context);
  weight.levels = levels_.data();
  weight.slopes = slopes_.empty() ? nullptr : slopes_.data();
  weight.step = step_.data();
  weight.base = base_.data();
  return weight;
}

// Codes are copied, because both modes rearrange them, and the file's pages are given back at once.
Factors::Factors(const Constants& constants, const Layer& layer) {
  const auto load = [&](size_t input, int64_t count) {
    Factor factor;
    if (layer.factor_bits() != 8) {
      factor.values = constants.floats(input + 1);
      // Values that are no codes have no scale; ones keep `middle` the same for both.
      factor.scales.assign(static_cast<size_t>(layer.rank), 1.0F);
      return factor;
    }
    const auto* codes = static_cast<const int8_t*>(constants.tensor(input).GetTensorRawData());
    factor.codes.assign(codes, codes + count);
    drop_mapped(codes, factor.codes.size());
    factor.scales = constants.floats(input + 1);
    return factor;
  };
  down = load(Port::kDown, layer.rank * layer.columns);
  up = load(Port::kUp, layer.rows * layer.rank);
}

// Panels of 32 outputs, the order of the weight itself: the same loops multiply both.
BranchStore::BranchStore(const Factors& factors, const Layer& layer)
    : rank_(layer.rank), middle_(static_cast<size_t>(layer.rank)) {
  down_ = {to_panels(factors.down.codes, rank_, layer.columns), to_panels(factors.down.values, rank_, layer.columns)};
  up_ = {to_panels(factors.up.codes, layer.rows, rank_), to_panels(factors.up.values, layer.rows, rank_)};
  for (size_t i = 0; i < middle_.size(); ++i) middle_[i] = factors.down.scales[i] * factors.up.scales[i];
}

LowRankBranch BranchStore::bind() const { return {rank_, down_.view(), up_.view(), middle_.data()}; }

}  // namespace rankbook::ort
