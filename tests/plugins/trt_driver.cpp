// Does with a plugin what TensorRT does, over the emulated kernels: a C interface for test_trt_plugin.py (ctypes).
#include <NvInferRuntime.h>

#include <cstring>
#include <deque>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulation/simt.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(std::int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

struct Logger final : ILogger {
  void log(Severity, const char* message) noexcept override { text += std::string(message) + "\n"; }
  std::string text;
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// Dimensions that are plain numbers.
struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Number(std::int64_t v) : value(v) { mImpl = this; }
  bool isConstant() const override { return true; }
  std::int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  std::int64_t value;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(std::int64_t value) override { return &numbers.emplace_back(value); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(std::int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  std::deque<Number> numbers;
};

template <typename Interface>
Interface* part(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

IPluginCreatorV3One* find(const char* name) {
  std::int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (std::int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::strcmp(creator->getPluginName(), name) == 0) return creator;
  }
  return nullptr;
}

std::string failure;

int fail(const std::string& what) {
  failure = what + (logger.text.empty() ? "" : ": " + logger.text);
  return 1;
}

struct Tensors {
  std::vector<PluginTensorDesc> in;
  PluginTensorDesc out{};
  std::vector<DynamicPluginTensorDesc> dynamic;
};

// Types, formats and shapes at build time, as the builder asks for them.
std::string build_phase(IPluginV3* plugin, Tensors* t) {
  auto* build = part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  const auto inputs = static_cast<std::int32_t>(t->in.size());
  std::vector<DataType> types;
  for (const auto& tensor : t->in) types.push_back(tensor.type);
  if (build->getNbOutputs() != 1) return "getNbOutputs";
  if (build->getOutputDataTypes(&t->out.type, 1, types.data(), inputs) != 0) return "getOutputDataTypes";

  Builder builder;
  std::vector<DimsExprs> shapes(t->in.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    shapes[i].nbDims = t->in[i].dims.nbDims;
    for (int d = 0; d < shapes[i].nbDims; ++d) shapes[i].d[d] = builder.constant(t->in[i].dims.d[d]);
  }
  DimsExprs y{};
  if (build->getOutputShapes(shapes.data(), inputs, nullptr, 0, &y, 1, builder) != 0) return "getOutputShapes";
  t->out.dims.nbDims = y.nbDims;
  for (int d = 0; d < y.nbDims; ++d) t->out.dims.d[d] = y.d[d]->getConstantValue();

  for (const auto& tensor : t->in) t->dynamic.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
  t->dynamic.push_back({t->out, t->out.dims, t->out.dims, t->out.dims});
  for (std::int32_t i = 0; i <= inputs; ++i) {
    auto& tensor = t->dynamic[i].desc;
    if (!build->supportsFormatCombination(i, t->dynamic.data(), inputs, 1)) return "format " + std::to_string(i);
    const TensorFormat format = tensor.format;
    tensor.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(i, t->dynamic.data(), inputs, 1)) return "accepts CHW32 " + std::to_string(i);
    tensor.format = format;
    const DataType type = tensor.type;
    tensor.type = DataType::kBOOL;
    if (build->supportsFormatCombination(i, t->dynamic.data(), inputs, 1)) return "accepts BOOL " + std::to_string(i);
    tensor.type = type;
  }
  if (build->configurePlugin(t->dynamic.data(), inputs, &t->dynamic[inputs], 1) != 0) return "configurePlugin";
  if (std::strlen(build->getTimingCacheID()) == 0) return "getTimingCacheID";
  return "";
}

// Attributes, stored fields and shapes that lie: what a stranger's graph or engine may hold. Values stay within what
// TensorRT's own types hold; a field's data are as long as its length and type say.
struct Liar {
  explicit Liar(std::uint32_t seed) : random(seed) {}

  template <typename T, std::size_t n>
  T any(const T (&values)[n]) {
    return values[random() % n];
  }
  bool sometimes(std::uint32_t one_in) { return random() % one_in == 0; }
  std::int64_t number() {
    constexpr std::int64_t kNumbers[] = {0,  1,  -1, 2,       3,         7,         8,         31,        32,
                                         48, 96, 97, 1 << 20, INT32_MAX, 1LL << 31, 1LL << 40, INT64_MAX, INT64_MIN};
    return any(kNumbers);
  }

  // A copy of fields in memory of exactly their size, so that a sanitizer sees what is read beyond it.
  std::vector<PluginField> changed(const PluginFieldCollection& given) {
    constexpr const char* kNames[] = {"in_features", "out_features", "offset", "layer", "", "x"};
    constexpr PluginFieldType kTypes[] = {PluginFieldType::kINT32, PluginFieldType::kINT64, PluginFieldType::kCHAR,
                                          PluginFieldType::kFLOAT32, PluginFieldType::kUNKNOWN};
    constexpr std::int32_t kLengths[] = {0, 1, 2, 7, -1, INT32_MIN};
    std::vector<PluginField> fields;
    for (std::int32_t i = 0; i < given.nbFields; ++i) {
      PluginField field = given.fields[i];
      if (sometimes(12)) continue;
      if (sometimes(12)) field.name = sometimes(4) ? nullptr : any(kNames);
      const bool lies = sometimes(6);
      if (lies) {
        field.type = any(kTypes);
        field.length = any(kLengths);
      }
      const std::size_t item = field.type == PluginFieldType::kINT64   ? 8
                               : field.type == PluginFieldType::kINT32 ? 4
                                                                       : 1;
      const std::size_t size = field.length > 0 ? item * static_cast<std::size_t>(field.length) : 0;
      auto& bytes = memory.emplace_back(new unsigned char[size]);
      for (std::size_t b = 0; b < size; ++b) bytes[b] = static_cast<unsigned char>(random());
      if (!lies && given.fields[i].data != nullptr) std::memcpy(bytes.get(), given.fields[i].data, size);
      if (!lies && size == 4 && sometimes(6)) {
        const auto value = static_cast<std::int32_t>(number());
        std::memcpy(bytes.get(), &value, sizeof value);
      }
      field.data = sometimes(16) ? nullptr : bytes.get();
      fields.push_back(field);
    }
    if (!fields.empty() && sometimes(8)) fields.push_back(fields.front());
    return fields;
  }

  std::vector<PluginTensorDesc> changed(std::vector<PluginTensorDesc> tensors) {
    const std::uint32_t changes = random() % 3;
    for (std::uint32_t i = 0; i < changes; ++i) {
      PluginTensorDesc& tensor = tensors[random() % tensors.size()];
      switch (random() % 4) {
        case 0: tensor.type = static_cast<DataType>(random() % 12); break;
        case 1: tensor.dims.nbDims = static_cast<std::int32_t>(random() % (Dims::MAX_DIMS + 2)) - 1; break;
        case 2: tensor.format = static_cast<TensorFormat>(random() % 12); break;
        default:
          for (std::int64_t& size : tensor.dims.d) {
            if (sometimes(3)) size = number();
          }
      }
    }
    if (sometimes(16)) tensors.pop_back();
    return tensors;
  }

  std::mt19937 random;
  std::vector<std::unique_ptr<unsigned char[]>> memory;
};

// What a plugin is asked of an engine's shapes; true where it takes them.
bool takes(IPluginV3* plugin, const std::vector<PluginTensorDesc>& given) {
  if (given.empty()) return false;
  Tensors t;
  t.in = given;
  const bool builds = build_phase(plugin, &t).empty();
  const auto inputs = static_cast<std::int32_t>(given.size());
  if (t.dynamic.empty()) {
    for (const auto& tensor : given) t.dynamic.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    t.dynamic.push_back({t.out, t.out.dims, t.out.dims, t.out.dims});
  }
  part<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
      ->getWorkspaceSize(t.dynamic.data(), inputs, &t.dynamic[given.size()], 1);
  return part<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->onShapeChange(given.data(), inputs, &t.out,
                                                                                         1) == 0 &&
         builds;
}

}  // namespace

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

RB_EXPORT const char* rb_failure() { return failure.c_str(); }

// Names of all creators, a line each: name, namespace, version, fields.
RB_EXPORT const char* rb_creators() {
  static std::string text;
  text.clear();
  std::int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (std::int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    text += std::string(creator->getPluginName()) + " " + creator->getPluginNamespace() + " " +
            creator->getPluginVersion();
    const PluginFieldCollection* fields = creator->getFieldNames();
    for (std::int32_t f = 0; f < fields->nbFields; ++f) text += std::string(" ") + fields->fields[f].name;
    text += "\n";
  }
  return text.c_str();
}

// Runs one operator: node attributes to plugin, build phase, an engine's round trip, runtime phase. `dims` holds 8
// numbers per input; `y_dims` takes rank and sizes of the output.
RB_EXPORT int rb_run(const char* name, const std::int32_t* attributes, int inputs, const int* ranks,
                     const std::int64_t* dims, const int* types, const void* const* data, void* y,
                     std::int64_t* y_dims) {
  failure.clear();
  logger.text.clear();
  setLoggerFinder(&finder);
  IPluginCreatorV3One* creator = find(name);
  if (creator == nullptr) return fail("no creator");
  std::vector<PluginField> fields = {{"in_features", &attributes[0], PluginFieldType::kINT32, 1},
                                     {"out_features", &attributes[1], PluginFieldType::kINT32, 1},
                                     {"offset", &attributes[2], PluginFieldType::kINT32, 1}};
  PluginFieldCollection collection{attributes[3], fields.data()};
  std::unique_ptr<IPluginV3> node(creator->createPlugin("layer.7", &collection, TensorRTPhase::kBUILD));
  if (!node) return fail("createPlugin");

  Tensors t;
  for (int i = 0; i < inputs; ++i) {
    PluginTensorDesc tensor{};
    tensor.dims.nbDims = ranks[i];
    for (int d = 0; d < ranks[i]; ++d) tensor.dims.d[d] = dims[8 * i + d];
    tensor.type = static_cast<DataType>(types[i]);
    tensor.format = TensorFormat::kLINEAR;
    t.in.push_back(tensor);
  }
  std::unique_ptr<IPluginV3> clone(node->clone());
  if (const std::string step = build_phase(clone.get(), &t); !step.empty()) return fail(step);
  const std::size_t bytes = part<IPluginV3OneBuild>(clone.get(), PluginCapabilityType::kBUILD)
                                ->getWorkspaceSize(t.dynamic.data(), inputs, &t.dynamic[inputs], 1);

  // The engine copies what getFieldsToSerialize returns after the call; a copy of a copy must serve as well.
  const PluginFieldCollection* stored =
      part<IPluginV3OneRuntime>(clone.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  node.reset();
  std::unique_ptr<IPluginV3> loaded(creator->createPlugin("renamed", stored, TensorRTPhase::kRUNTIME));
  if (!loaded) return fail("createPlugin from stored fields");
  clone.reset();
  std::unique_ptr<IPluginV3> context(
      part<IPluginV3OneRuntime>(loaded.get(), PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
  auto* runtime = part<IPluginV3OneRuntime>(context.get(), PluginCapabilityType::kRUNTIME);
  if (runtime->onShapeChange(t.in.data(), inputs, &t.out, 1) != 0) return fail("onShapeChange");
  std::vector<unsigned char> scratch(bytes + 256, 0xff);
  auto* workspace = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 255) / 256 * 256);
  const auto begin = reinterpret_cast<std::uintptr_t>(workspace);
  rankbook::emulation::Machine::get().buffers.push_back({begin, begin + bytes, true});
  void* outputs[] = {y};
  y_dims[0] = t.out.dims.nbDims;
  for (int d = 0; d < t.out.dims.nbDims; ++d) y_dims[1 + d] = t.out.dims.d[d];
  if (runtime->enqueue(t.in.data(), &t.out, data, outputs, workspace, nullptr) != 0) return fail("enqueue");
  return 0;
}

// Gives `count` lies to an operator: attributes, then the fields that an engine would store of it, then shapes. `dims` and
// `types` are those of a node that is well; `taken` gets how often a plugin was made, made from stored fields, and took
// the shapes.
RB_EXPORT void rb_lies(const char* name, const std::int32_t* attributes, int inputs, const int* ranks,
                       const std::int64_t* dims, const int* types, std::uint32_t seed, int count, int* taken) {
  setLoggerFinder(&finder);
  IPluginCreatorV3One* creator = find(name);
  std::vector<PluginTensorDesc> tensors;
  for (int i = 0; i < inputs; ++i) {
    PluginTensorDesc tensor{};
    tensor.dims.nbDims = ranks[i];
    for (int d = 0; d < ranks[i]; ++d) tensor.dims.d[d] = dims[8 * i + d];
    tensor.type = static_cast<DataType>(types[i]);
    tensor.format = TensorFormat::kLINEAR;
    tensors.push_back(tensor);
  }
  const PluginField well[] = {{"in_features", &attributes[0], PluginFieldType::kINT32, 1},
                              {"out_features", &attributes[1], PluginFieldType::kINT32, 1},
                              {"offset", &attributes[2], PluginFieldType::kINT32, 1}};
  for (int i = 0; i < count; ++i) {
    logger.text.clear();
    Liar liar(seed + static_cast<std::uint32_t>(i));
    auto fields = liar.changed({static_cast<std::int32_t>(std::size(well)), well});
    const PluginFieldCollection given{static_cast<std::int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> made(creator->createPlugin("layer.7", &given, TensorRTPhase::kBUILD));
    if (!made) continue;
    ++taken[0];
    auto stored = liar.changed(
        *part<IPluginV3OneRuntime>(made.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize());
    const PluginFieldCollection read{static_cast<std::int32_t>(stored.size()), stored.data()};
    std::unique_ptr<IPluginV3> loaded(creator->createPlugin("renamed", &read, TensorRTPhase::kRUNTIME));
    if (!loaded) continue;
    ++taken[1];
    taken[2] += takes(loaded.get(), liar.changed(tensors));
  }
}
