// Reading of attributes and the entry points of the library: getCreators and setLoggerFinder, nothing else is exported.
#include "shims/trt/creator.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>

#include "shims/trt/plugin.h"

namespace rankbook::trt {

// TensorRT may set it from another thread than builds an engine.
static std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

namespace {

using Names = contract::CodebookMatMul;  // every kind has these attributes

using nvinfer1::ILogger;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Integers arrive as int32 from the parser and from engines; other front ends may give int64.

bool read_integer(const PluginField& field, std::int32_t* out) {
  // A list of one is what the parser makes of an integer attribute.
  if (field.data == nullptr || field.length != 1) return false;
  if (field.type == PluginFieldType::kINT32) {
    std::memcpy(out, field.data, sizeof *out);
    return true;
  }
  if (field.type != PluginFieldType::kINT64) return false;
  // Copied, as nothing says that the field is aligned.
  std::int64_t wide = 0;
  std::memcpy(&wide, field.data, sizeof wide);
  *out = static_cast<std::int32_t>(wide);
  return wide >= 0 && wide <= std::numeric_limits<std::int32_t>::max();
}

// Fills the operator's attributes and the name of the layer. Returns what is wrong, or nothing.
// Unknown fields are passed over: the parser adds some of its own.
std::string read_fields(const nvinfer1::PluginFieldCollection& fields, Operator* op, std::string* layer) {
  op->offset = -1;  // required: a forgotten offset must not pass for "no offset"
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    const std::string name = field.name == nullptr ? "" : field.name;
    std::int32_t* target = name == Names::kInFeatures    ? &op->in_features
                           : name == Names::kOutFeatures ? &op->out_features
                           : name == Names::kOffset      ? &op->offset
                                                         : nullptr;
    if (target != nullptr && !read_integer(field, target)) return "attribute " + name + " must be one integer";
    // An engine may hold anything here; what is no text leaves the name that TensorRT gives.
    if (name == kLayerField && field.data != nullptr && field.type == PluginFieldType::kCHAR && field.length > 0) {
      layer->assign(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    }
  }
  return check_attributes({op->bits, op->out_features, op->in_features, op->offset}, "");
}

}  // namespace

// Without a logger the message is lost; the call fails all the same.
void report(ILogger::Severity severity, const std::string& layer, const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) logger->log(severity, ("rankbook: " + layer + ": " + message).c_str());
}

// The list of fields is what the parser asks the node for.
Creator::Creator(Kind kind, bool int8, bool experts, std::int32_t bits) {
  op_.kind = kind;
  op_.int8 = int8;
  op_.experts = experts;
  op_.bits = bits;
  name_ = op_.name();
  for (const char* field : {Names::kInFeatures, Names::kOutFeatures, Names::kOffset}) {
    // Types as the parser is to convert the node's attributes.
    fields_.emplace_back(field, nullptr, PluginFieldType::kINT32, 1);
  }
  // The parser looks for these two on the node. kLayerField is no attribute: only engines hold it.
  for (const char* field : {"plugin_namespace", "plugin_version"}) {
    fields_.emplace_back(field, nullptr, PluginFieldType::kCHAR, 0);
  }
  collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  try {
    Operator op = op_;
    std::string layer_name = layer == nullptr ? "" : layer;
    const std::string problem =
        fields == nullptr ? "it was given no attributes" : read_fields(*fields, &op, &layer_name);
    if (problem.empty()) return new Plugin(op, layer_name);
    report(ILogger::Severity::kERROR, name_ + " " + layer_name, problem);
  // Nothing may be thrown into TensorRT.
  } catch (const std::exception& error) {
    report(ILogger::Severity::kERROR, name_, error.what());
  }
  return nullptr;
}

}  // namespace rankbook::trt

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

// load_library of the plugin registry looks for this symbol and registers what it returns.
RB_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  using rankbook::trt::Creator;
  using rankbook::trt::Kind;
  // Made once and never destroyed before the library is unloaded: TensorRT keeps the pointers.
  static std::vector<Creator> creators = [] {
    std::vector<Creator> made;
    made.reserve(9 * std::size(rankbook::contract::kBits));  // creators hold pointers into themselves: never moved
    for (const int bits : rankbook::contract::kBits) {
      // A8 and experts exist for products alone.
      for (const Kind kind : {Kind::kMatmul, Kind::kMatmulLowRank}) {
        for (const bool int8 : {false, true}) {
          for (const bool experts : {false, true}) made.emplace_back(kind, int8, experts, bits);
        }
      }
      made.emplace_back(Kind::kGather, false, false, bits);
    }
    return made;
  }();
  // Pointers to them in the form that TensorRT asks for, valid as long as the library is loaded.
  static std::vector<nvinfer1::IPluginCreatorInterface*> list = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> pointers;
    for (Creator& creator : creators) pointers.push_back(&creator);
    return pointers;
  }();
  count = static_cast<std::int32_t>(list.size());
  return list.data();
}

RB_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { rankbook::trt::logger_finder.store(finder); }
