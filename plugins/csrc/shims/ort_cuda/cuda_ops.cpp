#include "shims/ort_cuda/cuda_ops.h"

#ifndef RANKBOOK_EMULATION
#include <cuda_runtime_api.h>
#endif

#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <vector>

#include "contract.h"
#include "kernels/cuda/launch.h"
#include "shims/matmul.h"
#include "shims/ort/constants.h"
#include "shims/ort/guarded.h"

namespace rankbook::ort {
namespace {


enum class Kind { kMatMul, kLowRank, kGather };

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kBFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

// The tests run these operators over emulated kernels, in a session of the CPU.
#ifdef RANKBOOK_EMULATION
constexpr const char* kProvider = nullptr;
#else
constexpr const char* kProvider = "CUDAExecutionProvider";
#endif

cuda::DataType kernel_type(ONNXTensorElementDataType type) {
  if (type == kHalf) return cuda::DataType::kFloat16;
  return type == kBFloat ? cuda::DataType::kBFloat16 : cuda::DataType::kFloat32;
}

// Memory of the provider for one call. ONNX Runtime keeps it from other streams until the work of this one is done.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, const Ort::ConstMemoryInfo& where, void* stream, size_t bytes) {
    if (bytes == 0) return;
    OrtKernelContext* const raw = context.GetOrtKernelContext();
    Ort::ThrowOnError(api_.KernelContext_GetAllocator(raw, where, &allocator_));
    OrtStatus* const status = stream == nullptr  // a provider without streams
                                  ? api_.AllocatorAlloc(allocator_, bytes, &data_)
                                  : api_.KernelContext_GetScratchBuffer(raw, where, bytes, &data_);
    if (status == nullptr) return;
    release();
    Ort::ThrowOnError(status);
  }
  ~Scratch() { release(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return data_; }

 private:
  void release() {
    if (data_ != nullptr) Ort::Status(api_.AllocatorFree(allocator_, data_));  // a status that nobody can act on
    if (allocator_ != nullptr) api_.ReleaseAllocator(allocator_);
  }

  const OrtApi& api_ = Ort::GetApi();
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// A tensor among the attributes of a node, in the memory of the provider.
class DeviceCopy {
 public:
  DeviceCopy(const OrtKernelInfo* info, const Ort::ConstValue& value) {
    const auto about = value.GetTensorTypeAndShapeInfo();
    const size_t size = about.GetElementType() == kFloat ? 4 : about.GetElementType() == kHalf ? 2 : 1;
    const size_t bytes = about.GetElementCount() * size;
    Ort::ThrowOnError(api_.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
    if (OrtStatus* const status = api_.AllocatorAlloc(allocator_, bytes, &data_)) {
      api_.ReleaseAllocator(allocator_);
      Ort::ThrowOnError(status);
    }
#ifdef RANKBOOK_EMULATION
    std::memcpy(data_, value.GetTensorRawData(), bytes);
#else
    const cudaError_t error = cudaMemcpy(data_, value.GetTensorRawData(), bytes, cudaMemcpyHostToDevice);
    if (error == cudaSuccess) return;
    release();
    throw Ort::Exception(cudaGetErrorString(error), ORT_FAIL);
#endif
  }
  ~DeviceCopy() { release(); }
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;

  const void* get() const { return data_; }

 private:
  void release() {
    Ort::Status(api_.AllocatorFree(allocator_, data_));  // a status that nobody can act on
    api_.ReleaseAllocator(allocator_);
  }

  const OrtApi& api_ = Ort::GetApi();
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

// Where the constant of one input is.
struct Source {
  Place place;
  std::shared_ptr<const DeviceCopy> copy;  // instead of a place

  const void* in(const Ort::KernelContext& context) const { return copy != nullptr ? copy->get() : place.in(context); }
};

// One product of a node: what it is, and its constants by input.
struct Product {
  Layer layer;
  cuda::Matmul sizes;  // without pointers
  std::vector<Source> sources;
};

class CudaKernel {
 public:
  CudaKernel(std::vector<Product> products, std::string node, Kind kind)
      : products_(std::move(products)), node_(std::move(node)), kind_(kind) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  void compute(const Ort::KernelContext& context) const {
    const Ort::ConstValue x = context.GetInput(Port::kX);
    const auto info = x.GetTensorTypeAndShapeInfo();
    Shape shape = shape_of(info);
    if (kind_ == Kind::kGather) return gather(context, x, shape);
    const int columns = products_[0].sizes.weight.columns;
    if (!shape.has(1) || shape.last() != columns) {
      fail("x has shape " + shape.text() + "; its last size must be in_features = " + std::to_string(columns));
    }
    const size_t tokens = info.GetElementCount() / static_cast<size_t>(columns);
    if (tokens > static_cast<size_t>(std::numeric_limits<int>::max())) fail("x has more than 2^31 - 1 rows");
    for (size_t i = 0; i < products_.size(); ++i) {
      cuda::Matmul m = bound(context, i);
      shape.last() = m.weight.rows;
      m.x = x.GetTensorRawData();
      m.y = context.GetOutput(i, shape.at.data(), shape.axes).GetTensorMutableRawData();
      m.type = kernel_type(info.GetElementType());
      m.tokens = static_cast<int>(tokens);
      if (tokens == 0) continue;
      const Scratch scratch(context, x.GetTensorMemoryInfo(), context.GetGPUComputeStream(), cuda::matmul_workspace(m));
      m.workspace = scratch.get();
      report(cuda::launch_matmul(m, context.GetGPUComputeStream()));
    }
  }

  void gather(const Ort::KernelContext& context, const Ort::ConstValue& indices, Shape shape) const {
    const cuda::Matmul m = bound(context, 0);
    const auto count = static_cast<int64_t>(indices.GetTensorTypeAndShapeInfo().GetElementCount());
    if (!shape.has(0) || shape.axes == Shape::kMostAxes) fail("indices have shape " + shape.text() + "; that is too many axes");
    shape.at[shape.axes++] = m.weight.columns;
    auto* y = context.GetOutput(0, shape.at.data(), shape.axes).GetTensorMutableData<float>();
    report(cuda::launch_gather({m.weight, indices.GetTensorData<int64_t>(), y, count}, context.GetGPUComputeStream()));
  }

  // One product with its pointers.
  cuda::Matmul bound(const Ort::KernelContext& context, size_t product) const {
    const Product& one = products_[product];
    cuda::Matmul m = one.sizes;
    set_constants(one.layer, [&](size_t input) { return one.sources[input].in(context); }, &m);
    return m;
  }

  void report(const cuda::Status& status) const {
    if (!status.ok()) fail(status.message);
  }

  [[noreturn]] void fail(const std::string& sentence) const {
    throw Ort::Exception(node_ + ": " + sentence, ORT_INVALID_ARGUMENT);
  }

  std::vector<Product> products_;
  std::string node_;
  Kind kind_;
};

// One operator at one width and one type of activations.
struct CudaOp : Ort::CustomOpBase<CudaOp, CudaKernel, true> {
  Kind kind;
  int bits;
  ONNXTensorElementDataType type;
  bool rounds;  // x to 8 bits
  int merged;   // products of a merged operator; 0 in others, which have one
  std::string name;

  CudaOp(Kind kind_, int bits_, ONNXTensorElementDataType type_, bool rounds_, int merged_)
      : kind(kind_), bits(bits_), type(type_), rounds(rounds_), merged(merged_) {
    name = kind == Kind::kGather    ? contract::CodebookGather::kName
           : kind == Kind::kLowRank ? Port::kName
                                    : contract::CodebookMatMul::kName;
    name += std::to_string(bits) + (rounds ? contract::CodebookMatMulA8::kSuffix : "");
    if (merged > 0) name += contract::kMerged + std::to_string(merged);
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new CudaKernel(read_products(info), Constants(info, names(), name).node(), kind); });
  }

  std::vector<Product> read_products(const OrtKernelInfo* info) const {
    std::vector<Product> out;
    for (int i = 0; i < products(); ++i) {
      const Constants constants(info, names(), name, merged > 0 ? i : Constants::kAlone);
      constants.expect_inputs(merged > 0 ? 2 : inputs_alone());
      const Layer layer = constants.layer(bits, inputs_alone(), kCudaLimits);
      constants.check_elements(layer, true);
      out.push_back({layer, matmul_of(layer, rounds), read_sources(info, constants)});
      if (layer.columns != out[0].layer.columns) constants.fail("all products must have the same in_features");
    }
    return out;
  }

  std::vector<Source> read_sources(const OrtKernelInfo* info, const Constants& constants) const {
    std::vector<Source> out(inputs_alone());
    for (size_t input = 1; input < out.size(); ++input) {
      const Ort::ConstValue value = constants.tensor(input);
      if (constants.is_attribute(input)) {
        out[input].copy = std::make_shared<const DeviceCopy>(info, value);
      } else {
        out[input].place = constants.place(input);
      }
    }
    return out;
  }

  int products() const { return merged > 0 ? merged : 1; }

  size_t inputs_alone() const {
    return kind == Kind::kGather    ? size_t{contract::CodebookGather::kInputCount}
           : kind == Kind::kLowRank ? size_t{Port::kInputCount}
                                    : size_t{contract::CodebookMatMul::kInputCount};
  }

  const char* const* names() const { return kind == Kind::kGather ? contract::CodebookGather::kInputs : Port::kInputs; }

  const char* GetName() const { return name.c_str(); }
  const char* GetExecutionProviderType() const { return kProvider; }
  // The constants are one input of any number and types, checked when a node is created: ONNX Runtime keeps the names of
  // all types for every input that is declared, 6 MB for these operators.
  size_t GetInputTypeCount() const { return 2; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t input) const {
    return input == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  }
  bool GetVariadicInputHomogeneity() const { return false; }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    if (input > 0) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    return kind == Kind::kGather ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
  }
  size_t GetOutputTypeCount() const { return static_cast<size_t>(products()); }
  ONNXTensorElementDataType GetOutputType(size_t) const { return type; }
};

}  // namespace

void add_cuda_operators(Ort::CustomOpDomain& domain) {
  auto& operators = *new std::list<CudaOp>;
  const auto add = [&](Kind kind, int bits, ONNXTensorElementDataType type, bool rounds, int merged) {
    operators.emplace_back(kind, bits, type, rounds, merged);
    domain.Add(&operators.back());
  };
  for (const int bits : contract::kBits) {
    for (const auto type : {kFloat, kHalf, kBFloat}) {
      for (int merged = 0; merged <= contract::kMostMerged; ++merged) {
        for (const bool rounds : {false, true}) {
          add(Kind::kMatMul, bits, type, rounds, merged);
          add(Kind::kLowRank, bits, type, rounds, merged);
        }
      }
    }
    add(Kind::kGather, bits, kFloat, false, 0);
  }
}

std::string cuda_state() {
#ifdef RANKBOOK_EMULATION
  return "emulated";
#else
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return std::to_string(count) + (count == 1 ? " device" : " devices");
#endif
}

bool serves_gpu() { return true; }

}  // namespace rankbook::ort
