// The operators for packed layers on the CUDA provider: constants on the device, scratch from the provider's arena,
// work on its stream. The device code is kernels/cuda, the same that TensorRT's plugins call; never run on a GPU.
//
// Built with RANKBOOK_EMULATION the same file runs in a session of the CPU over emulated kernels
// (tests/plugins/test_ort_cuda.py).
#include "shims/ort_cuda/cuda_ops.h"

#include <cuda_runtime_api.h>

#include <limits>
#include <list>
#include <memory>
#include <vector>

#include "contract.h"
#include "kernels/cuda/launch.h"
#include "shims/matmul.h"
#include "shims/ort/constants.h"
#include "shims/ort/guarded.h"
#include "shims/ort/signature.h"

namespace rankbook::ort {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kBFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

// The tests run these operators over emulated kernels, in a session of the CPU.
// There is no CUDA provider where there is no GPU, and an operator for the CPU's is otherwise the same.
#ifdef RANKBOOK_EMULATION
constexpr const char* kProvider = nullptr;
#else
constexpr const char* kProvider = "CUDAExecutionProvider";
#endif

// Only the three types that a signature has can come here.
cuda::DataType kernel_type(ONNXTensorElementDataType type) {
  if (type == kHalf) return cuda::DataType::kFloat16;
  return type == kBFloat ? cuda::DataType::kBFloat16 : cuda::DataType::kFloat32;
}

// Memory of the provider for one call. ONNX Runtime keeps it from other streams until the work of this one is done.
// A buffer of the arena, reused by the next node: growing it inside a capture of the stream would fail, so that every
// shape must have run once before.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, const Ort::ConstMemoryInfo& where, void* stream, size_t bytes) {
    if (bytes == 0) return;
    OrtKernelContext* const raw = context.GetOrtKernelContext();
    Ort::ThrowOnError(api_.KernelContext_GetAllocator(raw, where, &allocator_));
    // A scratch buffer belongs to the stream of the node; where there are no streams (the emulation) the plain
    // allocator serves.
    OrtStatus* const status = stream == nullptr  // a provider without streams
                                  ? api_.AllocatorAlloc(allocator_, bytes, &data_)
                                  : api_.KernelContext_GetScratchBuffer(raw, where, bytes, &data_);
    if (status == nullptr) return;
    release();
    Ort::ThrowOnError(status);
  }
  // Freed when the call returns, while the kernels may still run: the arena gives it to later work of the same stream
  // only.
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
// Attributes are host memory for every provider, inputs are not.
class DeviceCopy {
 public:
  DeviceCopy(const OrtKernelInfo* info, const Ort::ConstValue& value) {
    const auto about = value.GetTensorTypeAndShapeInfo();
    // The types that constants may have: fp32, fp16, int8.
    const size_t size = about.GetElementType() == kFloat ? 4 : about.GetElementType() == kHalf ? 2 : 1;
    const size_t bytes = about.GetElementCount() * size;
    // The provider's allocator: memory of the device that it was made for.
    Ort::ThrowOnError(api_.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
    // The destructor of a half-made object does not run: what was taken is given back here.
    if (OrtStatus* const status = api_.AllocatorAlloc(allocator_, bytes, &data_)) {
      api_.ReleaseAllocator(allocator_);
      Ort::ThrowOnError(status);
    }
    // A copy from memory that is not pinned may return before its bytes have arrived, and the streams of ONNX Runtime do
    // not wait for the default stream, on which it runs: without the second call a first step could read what was there
    // before.
    cudaError_t error = cudaMemcpy(data_, value.GetTensorRawData(), bytes, cudaMemcpyHostToDevice);
    if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
    if (error == cudaSuccess) return;
    release();
    throw Ort::Exception(cudaGetErrorString(error), ORT_FAIL);
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
// Large constants are inputs, which ONNX Runtime has brought to the GPU; small ones of merged nodes are attributes,
// copied here.
struct Source {
  Place place;
  std::shared_ptr<const DeviceCopy> copy;  // instead of a place

  const void* in(const Ort::KernelContext& context) const { return copy != nullptr ? copy->get() : place.in(context); }
};

// One product of a node: what it is, and its constants by input.
// `sizes` is computed once; a call copies it and adds pointers.
struct Product {
  Layer layer;
  cuda::Matmul sizes;  // without pointers
  std::vector<Source> sources;
};

// The products of a node, in ONNX Runtime's stream; nothing waits for the GPU here.
class CudaKernel {
 public:
  CudaKernel(std::vector<Product> products, std::string node, Kind kind)
      : products_(std::move(products)), node_(std::move(node)), kind_(kind) {}

  // Returns when everything is enqueued; ONNX Runtime waits for the stream where it copies results.
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
    // The kernels count tokens in int; slices of 65,472 are theirs.
    if (tokens > static_cast<size_t>(std::numeric_limits<int>::max())) fail("x has more than 2^31 - 1 rows");
    static_assert(contract::kMostMerged <= cuda::kMostProducts);
    cuda::Matmul all[cuda::kMostProducts];
    const int count = static_cast<int>(products_.size());
    for (int i = 0; i < count; ++i) {
      cuda::Matmul& m = all[i] = bound(context, i);
      // Leading axes are x's.
      shape.last() = m.weight.rows;
      m.x = x.GetTensorRawData();
      m.y = context.GetOutput(i, shape.at.data(), shape.axes).GetTensorMutableRawData();
      m.type = kernel_type(info.GetElementType());
      m.tokens = static_cast<int>(tokens);
      if (m.experts > 0) m.numbers = numbers(context, shape, m.tokens);
    }
    // An empty batch has outputs of no elements and needs no kernel.
    if (tokens == 0) return;
    const size_t bytes = cuda::matmuls_workspace(all, count);
    const Scratch scratch(context, x.GetTensorMemoryInfo(), context.GetGPUComputeStream(), bytes);
    all[0].workspace = scratch.get();
    // A sentence of the kernels gets the node's name.
    report(cuda::launch_matmuls(all, count, context.GetGPUComputeStream()));
  }

  // On the GPU, where the router has left them: a number that no expert has gives NaN, as an index outside of the rows does.
  const std::int64_t* numbers(const Ort::KernelContext& context, const Shape& x, int tokens) const {
    const Ort::ConstValue given = context.GetInput(contract::CodebookExperts::kExperts);
    const Shape shape = shape_of(given);
    if (x.axes != 2 || !(shape == Shape{tokens})) {
      fail("experts has shape " + shape.text() + " beside " + std::to_string(x.axes) + " axes of x; they must be (S) and (S, in_features)");
    }
    return given.GetTensorData<std::int64_t>();
  }

  // An index outside of the rows gives NaN: a kernel cannot raise an error, and reading indices back would stop the
  // stream.
  void gather(const Ort::KernelContext& context, const Ort::ConstValue& indices, Shape shape) const {
    // A look-up is a node of one weight; of the structure only that is used.
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

// Registered beside the CPU's operator of the same name; ONNX Runtime takes the one of the provider that it gives the
// node to.
struct CudaOp : SignedOp<CudaOp, CudaKernel> {
  using SignedOp::SignedOp;

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] {
      // The node's name alone; products have suffixes of their own.
      const std::string node = Constants(info, signature.input_names(), name).node();
      *kernel = new CudaKernel(read_products(info), node, signature.kind);
    });
  }

  // Checked as on the CPU, with the limits of the CUDA kernels.
  std::vector<Product> read_products(const OrtKernelInfo* info) const {
    std::vector<Product> out;
    const size_t inputs = signature.inputs_alone();
    for (int i = 0; i < signature.products(); ++i) {
      const Constants constants(info, signature.input_names(), name, signature.which(i));
      constants.expect_inputs(signature.merged > 0 ? 2 : inputs + (signature.experts ? 1 : 0));
      int64_t stacked = 0;
      const Layer layer = constants.layer(signature.bits, inputs, kCudaLimits, signature.experts ? &stacked : nullptr);
      if (signature.experts) {
        constexpr auto at = contract::CodebookExperts::kExperts;
        constants.expect_type(at, contract::CodebookExperts::kInputs[at], contract::Type::kInt64);
      }
      constants.check_elements(layer, true);
      out.push_back({layer, matmul_of(layer, signature.int8_activations, stacked), read_sources(info, constants, inputs)});
      if (layer.columns != out[0].layer.columns) constants.fail("all products must have the same in_features");
    }
    return out;
  }

  static std::vector<Source> read_sources(const OrtKernelInfo* info, const Constants& constants, size_t inputs) {
    std::vector<Source> out(inputs);
    for (size_t input = 1; input < inputs; ++input) {
      const Ort::ConstValue value = constants.tensor(input);
      if (constants.is_attribute(input)) {
        out[input].copy = std::make_shared<const DeviceCopy>(info, value);
      } else {
        out[input].place = constants.place(input);
      }
    }
    return out;
  }

  const char* GetExecutionProviderType() const { return kProvider; }
};

}  // namespace

void add_cuda_operators(Ort::CustomOpDomain& domain) {
  auto& operators = *new std::list<CudaOp>;
  const auto add = [&](const Signature& each) { domain.Add(&operators.emplace_back(each)); };
  each_signature(add);
  each_experts_signature(add);
}

// cudaGetDeviceCount answers with an error, and nothing worse, where there is no driver.
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
