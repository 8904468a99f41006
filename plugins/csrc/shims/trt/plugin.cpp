// The plugin: TensorRT's questions about shapes, types and memory, and the call of the kernels.
#include "shims/trt/plugin.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>

#include "kernels/cuda/launch.h"
#include "shims/matmul.h"

namespace rankbook::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// Part of the timing-cache id: raise it when the kernels change so much that old timings mean nothing.
constexpr int kKernelVersion = 3;

// supportsFormatCombination has let three types through.
cuda::DataType kernel_type(DataType type) {
  if (type == DataType::kHALF) return cuda::DataType::kFloat16;
  return type == DataType::kBF16 ? cuda::DataType::kBFloat16 : cuda::DataType::kFloat32;
}

// Types and shapes of all inputs; those of the builder at their largest.
// A builder knows ranges of shapes: the constants' are fixed, of x the largest is what the workspace must hold.
struct Given {
  Constant inputs[kMaxInputs];
  Given(const PluginTensorDesc* in, std::int32_t count) {
    for (std::int32_t i = 0; i < count; ++i) inputs[i] = constant_of(in[i].type, in[i].dims);
  }
  Given(const DynamicPluginTensorDesc* in, std::int32_t count) {
    for (std::int32_t i = 0; i < count; ++i) inputs[i] = constant_of(in[i].desc.type, in[i].max);
  }
};

}  // namespace

// The timing id names what a measurement depends on beside the shapes.
Plugin::Plugin(const Operator& op, std::string layer)
    : op_(op), layer_(std::move(layer)), name_(op.name()) {
  timing_id_ = "v" + std::to_string(kKernelVersion) + " in=" + std::to_string(op.in_features) +
               " out=" + std::to_string(op.out_features) + " offset=" + std::to_string(op.offset);
}

// One object has all three capabilities; TensorRT asks for each by its number.
nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    default: return nullptr;
  }
}

// TensorRT clones for the builder's attempts and for every execution context, whose shapes are then its own.
nvinfer1::IPluginV3* Plugin::clone() noexcept {
  try {
    auto* copy = new Plugin(op_, layer_);
    // A context may run before its shapes change for the first time.
    copy->stored_ = stored_;
    copy->stacked_ = stacked_;
    return copy;
  } catch (const std::exception& error) {
    refuse(error.what());
    return nullptr;
  }
}

// Everything about the constants is checked at build time, so that an engine does not fail on its first call.
std::int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t inputs,
                                     const DynamicPluginTensorDesc*, std::int32_t) noexcept {
  if (inputs != op_.inputs()) {
    return refuse("it has " + std::to_string(inputs) + " inputs; " + std::to_string(op_.inputs()) + " are expected");
  }
  const std::string problem = op_.read(Given(in, inputs).inputs, &stored_, &stacked_);
  return problem.empty() ? 0 : refuse(problem);
}

// Called before configurePlugin, possibly with types that are refused later.
std::int32_t Plugin::getOutputDataTypes(DataType* output_types, std::int32_t outputs, const DataType* input_types,
                                        std::int32_t inputs) const noexcept {
  if (outputs != 1 || inputs != op_.inputs()) {
    return refuse("it has " + std::to_string(inputs) + " inputs; " + std::to_string(op_.inputs()) + " are expected");
  }
  output_types[0] = op_.kind == Kind::kGather ? DataType::kFLOAT : input_types[Port::kX];
  return 0;
}

// Symbolic: leading sizes stay what they are, only the last one is known.
std::int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t inputs, const nvinfer1::DimsExprs*,
                                     std::int32_t, nvinfer1::DimsExprs* out, std::int32_t outputs,
                                     nvinfer1::IExprBuilder& builder) noexcept {
  // A look-up has one axis more than its indices, a product as many as x.
  const bool gather = op_.kind == Kind::kGather;
  if (outputs != 1 || inputs != op_.inputs() || in[Port::kX].nbDims < (gather ? 0 : 1) ||
      in[Port::kX].nbDims + (gather ? 1 : 0) > Dims::MAX_DIMS) {
    return refuse("the number of inputs or the number of dimensions of the first one is wrong");
  }
  // The leading axes stay expressions of the builder.
  out[0] = in[Port::kX];
  if (gather) ++out[0].nbDims;
  out[0].d[out[0].nbDims - 1] = builder.constant(op_.output_features());
  return 0;
}

// Linear formats alone: codes are packed bytes, which a vectorized format would take apart.
bool Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                       std::int32_t inputs, std::int32_t outputs) noexcept {
  if (inputs != op_.inputs() || outputs != 1 || position < 0 || position > inputs) return false;
  const PluginTensorDesc& tensor = tensors[position].desc;
  return tensor.format == TensorFormat::kLINEAR && op_.allows(position, tensor.type, tensors[Port::kX].desc.type);
}

// For the largest shapes of the profile; matmul_workspace covers fewer tokens as well.
std::size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t inputs,
                                     const DynamicPluginTensorDesc*, std::int32_t) const noexcept {
  // Look-ups need no scratch.
  if (op_.kind == Kind::kGather || inputs != op_.inputs()) return 0;
  // Not stored_: the builder asks for shapes of several profiles.
  Layer layer;
  std::int64_t stacked = 0;
  const std::int64_t tokens = count_items(op_, in[Port::kX].max);
  // What is wrong with the shapes is reported by configurePlugin and onShapeChange.
  const bool fits = op_.read(Given(in, inputs).inputs, &layer, &stacked).empty();
  if (!fits || tokens <= 0 || tokens > std::numeric_limits<std::int32_t>::max()) return 0;
  cuda::Matmul m = matmul_of(layer, op_.int8, stacked);
  m.type = kernel_type(in[Port::kX].desc.type);
  m.tokens = static_cast<int>(tokens);
  return cuda::matmul_workspace(m);
}

// At run time, for the shapes of the next calls; forms and sizes of the constants are kept for enqueue.
std::int32_t Plugin::onShapeChange(const PluginTensorDesc* in, std::int32_t inputs, const PluginTensorDesc*,
                                   std::int32_t) noexcept {
  if (inputs != op_.inputs()) {
    return refuse("it has " + std::to_string(inputs) + " inputs; " + std::to_string(op_.inputs()) + " are expected");
  }
  const Given given(in, inputs);
  if (const std::string problem = op_.read(given.inputs, &stored_, &stacked_); !problem.empty()) return refuse(problem);
  const std::int64_t items = count_items(op_, in[Port::kX].dims);
  if (items < 0 || items > std::numeric_limits<std::int32_t>::max()) {
    return refuse("the first input has shape " + given.inputs[Port::kX].shape.text() + ", which is unknown or too large");
  }
  // Here and not where engines are built, whose largest shapes belong to other calls.
  const Shape& numbers = given.inputs[contract::CodebookExperts::kExperts].shape;
  if (op_.experts && !(numbers == Shape{items})) {
    return refuse("experts has shape " + numbers.text() + "; it must be (" + std::to_string(items) + "), one number for each row of x");
  }
  return 0;
}

// Only launches: no allocation and no wait, as a captured stream demands.
std::int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                             void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  // Half a hundred assignments a call, which is less than one launch.
  cuda::Matmul m = matmul_of(stored_, op_.int8, stacked_);
  set_constants(stored_, [&](int port) { return inputs[op_.position(port)]; }, &m);
  const std::int64_t items = count_items(op_, in[Port::kX].dims);
  cuda::Status status;
  if (op_.kind == Kind::kGather) {
    // An index outside of the rows gives NaN, as on every GPU runtime.
    status = cuda::launch_gather(
        {m.weight, static_cast<const std::int64_t*>(inputs[Port::kX]), static_cast<float*>(outputs[0]), items}, stream);
  } else {
    m.x = inputs[Port::kX];
    if (op_.experts) m.numbers = static_cast<const std::int64_t*>(inputs[contract::CodebookExperts::kExperts]);
    m.y = outputs[0];
    m.type = kernel_type(in[Port::kX].type);
    m.tokens = static_cast<int>(items);
    m.workspace = workspace;
    status = cuda::launch_matmul(m, stream);
  }
  return status.ok() ? 0 : refuse(status.message);
}

// No resource is shared between contexts.
nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

// What an engine stores of a layer: its attributes and its name; codes and parameters are inputs, which TensorRT
// stores.
const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  // Pointers into this object, which lives longer than TensorRT's use of them.
  fields_ = {
      {contract::CodebookMatMul::kInFeatures, &op_.in_features, PluginFieldType::kINT32, 1},
      {contract::CodebookMatMul::kOutFeatures, &op_.out_features, PluginFieldType::kINT32, 1},
      {contract::CodebookMatMul::kOffset, &op_.offset, PluginFieldType::kINT32, 1},
      {kLayerField, layer_.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(layer_.size())},
  };
  serialized_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
  return &serialized_;
}

// TensorRT takes a number; the sentence goes to its log.
std::int32_t Plugin::refuse(const std::string& message) const noexcept {
  report(nvinfer1::ILogger::Severity::kERROR, name_ + " " + layer_, message);
  return -1;
}

}  // namespace rankbook::trt
