// One plugin class serves every operator; what differs is the `Operator` it holds.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "shims/trt/operator.h"

namespace rankbook::trt {

// Reports through TensorRT's logger, once the library has been given one.
void report(nvinfer1::ILogger::Severity severity, const std::string& layer, const std::string& message) noexcept;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const Operator& op, std::string layer);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return name_.c_str(); }
  const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return contract::kPluginNamespace; }

  // IPluginV3OneBuild
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t inputs,
                               const nvinfer1::DynamicPluginTensorDesc* out, std::int32_t outputs) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* output_types, std::int32_t outputs,
                                  const nvinfer1::DataType* input_types, std::int32_t inputs) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t inputs,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_count,
                               nvinfer1::DimsExprs* out, std::int32_t outputs,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t inputs, std::int32_t outputs) noexcept override;
  std::int32_t getNbOutputs() const noexcept override { return 1; }
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t inputs,
                               const nvinfer1::DynamicPluginTensorDesc* out,
                               std::int32_t outputs) const noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }
  const char* getMetadataString() noexcept override { return timing_id_.c_str(); }

  // IPluginV3OneRuntime
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t inputs,
                             const nvinfer1::PluginTensorDesc* out, std::int32_t outputs) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  std::int32_t refuse(const std::string& message) const noexcept;

  Operator op_;
  std::string layer_;
  std::string name_;
  // The timing cache may reuse a measurement where this text and the shapes are equal.
  std::string timing_id_;
  // TensorRT calls onShapeChange before the first enqueue and after every change.
  Layer stored_;  // sizes and forms of the constants, set by onShapeChange
  std::int64_t stacked_ = 0;  // experts
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection serialized_{};
};

}  // namespace rankbook::trt
