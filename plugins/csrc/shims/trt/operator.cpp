// Shapes, types and attributes of the operators, and sentences about those that do not fit.
#include "shims/trt/operator.h"

namespace rankbook::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

// TensorRT's types in the words of contract.h; what is not there no constant may have.
contract::Type type_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return contract::Type::kFloat32;
    case DataType::kHALF: return contract::Type::kFloat16;
    case DataType::kBF16: return contract::Type::kBfloat16;
    case DataType::kINT8: return contract::Type::kInt8;
    case DataType::kINT64: return contract::Type::kInt64;
    default: return contract::Type::kOther;
  }
}

}  // namespace

// The op_type in ONNX, so that the parser finds the plugin for a node by its name.
std::string Operator::name() const {
  const bool branch = kind == Kind::kMatmulLowRank;
  const char* one = branch ? contract::CodebookMatMulLowRank::kName : contract::CodebookMatMul::kName;
  const char* all = branch ? contract::CodebookExpertsLowRank::kName : contract::CodebookExperts::kName;
  const char* name = kind == Kind::kGather ? contract::CodebookGather::kName : experts ? all : one;
  return name + std::to_string(bits) + (int8 ? contract::CodebookMatMulA8::kSuffix : "");
}

std::int32_t Operator::inputs() const {
  // With x or the indices, which are input 0.
  switch (kind) {
    case Kind::kMatmul: return position(contract::CodebookMatMul::kInputCount);
    case Kind::kMatmulLowRank: return position(contract::CodebookMatMulLowRank::kInputCount);
    default: return contract::CodebookGather::kInputCount;
  }
}

// x is checked here, its last size -1 where it is dynamic; the constants by view.cpp, as for ONNX Runtime.
std::string Operator::read(const Constant* given, Layer* layer, std::int64_t* stacked) const {
  const Shape& x = given[Port::kX].shape;
  Constant constants[Port::kInputCount];
  for (std::int32_t port = Port::kX + 1; position(port) < inputs(); ++port) constants[port] = given[position(port)];
  const std::size_t count = static_cast<std::size_t>(inputs() - (experts ? 1 : 0));
  *stacked = 0;
  if (experts) {
    const Shape& numbers = given[contract::CodebookExperts::kExperts].shape;
    if (x.axes != 2 || numbers.axes != 1) {
      return "x has shape " + x.text() + " and experts " + numbers.text() + "; they must be (S, in_features) and (S)";
    }
    if (const std::string problem = unstack(constants, count, stacked); !problem.empty()) return problem;
  }
  if (kind != Kind::kGather && (!x.has(1) || (x.last() != in_features && x.last() != -1))) {
    return "x has shape " + x.text() + "; its last size must be in_features = " + std::to_string(in_features);
  }
  return read_layer({bits, out_features, in_features, offset}, constants, count, kCudaLimits, "", layer);
}

// Asked for one input at a time, with those before it settled: a type is allowed if any form has it there; whether all
// belong together is for read().
bool Operator::allows(std::int32_t at, DataType type, DataType x_type) const {
  // Position inputs() is the output.
  if (at == inputs()) return type == (kind == Kind::kGather ? DataType::kFLOAT : x_type);
  if (at == Port::kX) {
    const bool is_float = type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    return kind == Kind::kGather ? type == DataType::kINT64 : is_float;
  }
  if (experts && at == contract::CodebookExperts::kExperts) return type == DataType::kINT64;
  for (const contract::Part& part : contract::kParts) {
    for (const contract::Form& form : part.forms) {
      for (const contract::Stored& stored : form.constants) {
        if (position(stored.input) == at && stored.type == type_of(type)) return true;
      }
    }
  }
  return false;
}

// -1 for a dynamic size, which no constant may have: read_layer then names it.
Constant constant_of(DataType type, const Dims& dims) {
  Constant out;
  out.type = type_of(type);
  out.shape.axes = static_cast<std::size_t>(dims.nbDims);
  for (std::int32_t i = 0; i < dims.nbDims; ++i) out.shape.at[static_cast<std::size_t>(i)] = dims.d[i];
  return out;
}

// -1 as well where a wrong profile multiplies to more than 64 bits hold; the caller refuses that, and more than 2^31.
std::int64_t count_items(const Operator& op, const Dims& dims) {
  std::int64_t count = 1;
  for (std::int32_t i = 0; i < dims.nbDims - (op.kind == Kind::kGather ? 0 : 1); ++i) {
    if (dims.d[i] < 0 || __builtin_mul_overflow(count, dims.d[i], &count)) return -1;
  }
  return count;
}

}  // namespace rankbook::trt
