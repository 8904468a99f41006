// Makes plugins from the attributes of a node, or from what an engine has stored.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "shims/trt/operator.h"

namespace rankbook::trt {

// One class for all operators, as with Plugin.
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator(Kind kind, bool int8, bool experts, std::int32_t bits);

  nvinfer1::IPluginV3* createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return name_.c_str(); }
  const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return contract::kPluginNamespace; }

 private:
  Operator op_;
  std::string name_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace rankbook::trt
