#include "ort/ops.h"

#include <list>
#include <vector>

#include "contract.h"
#include "kernels/half.h"
#include "ort/guarded.h"

namespace rankbook::ort {
namespace {

using MatMul = contract::CodebookMatMul;
using LowRank = contract::CodebookMatMulLowRank;
using Gather = contract::CodebookGather;
using RoundedMatMul = contract::CodebookMatMulA8;
using RoundedLowRank = contract::CodebookMatMulLowRankA8;

// Runs tasks on the thread pool of the session.
struct Tasks {
  void (*task)(void*, int64_t);
  void* argument;
};

void run_tasks(void* pool, int64_t count, void (*task)(void*, int64_t), void* argument) {
  Tasks tasks{task, argument};
  const auto one = [](void* data, size_t index) {
    const Tasks& all = *static_cast<const Tasks*>(data);
    all.task(all.argument, static_cast<int64_t>(index));
  };
  static_cast<const Ort::KernelContext*>(pool)->ParallelFor(one, static_cast<size_t>(count), 0, &tasks);
}

Parallel pool_of(const Ort::KernelContext& context) { return {const_cast<Ort::KernelContext*>(&context), run_tasks}; }

int64_t product(const std::vector<int64_t>& shape, size_t count) {
  int64_t out = 1;
  for (size_t i = 0; i < count; ++i) out *= shape[i];
  return out;
}

[[noreturn]] void fail(const std::string& node, const std::string& sentence) {
  throw Ort::Exception(node + ": " + sentence, ORT_INVALID_ARGUMENT);
}

// Memory on a cache line.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : held_(new uint8_t[static_cast<size_t>(bytes + 64)]) {}
  uint8_t* get() const { return held_.get() + (64 - reinterpret_cast<uintptr_t>(held_.get()) % 64) % 64; }

 private:
  std::unique_ptr<uint8_t[]> held_;
};

// One operator at one width and one type of activations.
struct Op : Ort::CustomOpBase<Op, MatMulKernel, true> {
  enum class Kind { kMatMul, kLowRank, kGather };

  Kind kind;
  int bits;
  ONNXTensorElementDataType type;
  std::string name;
  const Kernels kernels;

  Op(Kind kind_, int bits_, const char* suffix, ONNXTensorElementDataType type_, const Kernels& kernels_)
      : kind(kind_), bits(bits_), type(type_), kernels(kernels_) {
    name = (kind == Kind::kGather ? Gather::kName : kind == Kind::kLowRank ? LowRank::kName : MatMul::kName);
    name += std::to_string(bits) + suffix;
    if (kind != Kind::kGather) return;
    KernelDestroy = [](void* kernel) { delete static_cast<GatherKernel*>(kernel); };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<GatherKernel*>(kernel)->ComputeV2(context);
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] {
      if (kind == Kind::kGather) {
        *kernel = new GatherKernel(Constants(info, Gather::kInputs, name), bits);
      } else {
        const bool low_rank = kind == Kind::kLowRank;
        const Constants constants(info, low_rank ? LowRank::kInputs : MatMul::kInputs, name);
        *kernel = new MatMulKernel(constants, bits, low_rank, kernels);
      }
    });
  }

  const char* GetName() const { return name.c_str(); }
  size_t GetInputTypeCount() const {
    if (kind == Kind::kGather) return Gather::kInputCount;
    return kind == Kind::kLowRank ? size_t{LowRank::kInputCount} : size_t{MatMul::kInputCount};
  }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    switch (input) {  // the first five inputs of all three operators correspond
      case MatMul::kX:
        return kind == Kind::kGather ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
      case MatMul::kCodes:
      case MatMul::kParams:
      case LowRank::kDown:
      case LowRank::kUp:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
      case MatMul::kLevels:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
      default:  // several types fit: checked when the node is created
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return type; }
};

static_assert(MatMul::kCodes == static_cast<int>(Gather::kCodes) && MatMul::kBase == static_cast<int>(Gather::kBase));
static_assert(MatMul::kInputCount == static_cast<int>(RoundedMatMul::kInputCount));
static_assert(LowRank::kInputCount == static_cast<int>(RoundedLowRank::kInputCount));
static_assert(MatMul::kCodes == static_cast<int>(LowRank::kCodes) && MatMul::kBias == static_cast<int>(LowRank::kBias));

}  // namespace

MatMulKernel::MatMulKernel(const Constants& constants, int bits, bool low_rank, const Kernels& kernels)
    : node_(constants.node()),
      kernels_(kernels),
      weight_(constants, bits, MatMul::kCodes),
      out_features_(constants.attribute(contract::kOutFeatures, 1)),
      in_features_(constants.attribute(contract::kInFeatures, 1)) {
  constants.expect(MatMul::kBias, {{out_features_}, {1}});
  bias_ = constants.floats(MatMul::kBias);
  if (bias_.size() == 1 && out_features_ != 1) {
    const float value = bias_[0];
    if (value == 0.0F) {
      bias_.clear();
    } else {
      bias_.assign(static_cast<size_t>(out_features_), value);
    }
  }
  if (kernels_.rounds) integer_weight_.emplace(constants, weight_, kernels_.integers);
  if (low_rank) read_branch(constants);
  if (kernels_.copy) weight_.copy(constants);  // last: what lies behind the codes is then the next layer
}

void MatMulKernel::read_branch(const Constants& constants) {
  const Factors factors(constants, LowRank::kDown, out_features_, in_features_);
  if (kernels_.rounds) {
    integer_branch_ = IntegerBranchStore(factors, weight_.sizes(), kernels_.integers);
    if (kernels_.copy) integer_branch_.copy();
  } else {
    branch_ = BranchStore(factors, out_features_, in_features_);
  }
}

OrtStatusPtr MatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

void MatMulKernel::compute(const Ort::KernelContext& context) const {
  const Ort::ConstValue x = context.GetInput(MatMul::kX);
  const auto info = x.GetTensorTypeAndShapeInfo();
  std::vector<int64_t> shape = info.GetShape();
  if (shape.empty() || shape.back() != in_features_) {
    fail(node_, "x has shape " + describe(shape) + "; its last size must be in_features = " + std::to_string(in_features_));
  }
  const int64_t tokens = product(shape, shape.size() - 1);
  shape.back() = out_features_;
  auto y = context.GetOutput(0, shape);

  const auto type = info.GetElementType();
  Status status = Status::kOk;
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    status = multiply(context, x.GetTensorData<float>(), tokens, y.GetTensorMutableData<float>());
  } else {
    const auto inputs = static_cast<size_t>(tokens * in_features_);
    const auto outputs = static_cast<size_t>(tokens * out_features_);
    const std::unique_ptr<float[]> staged(new float[inputs + outputs]);
    const bool half = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    const auto* from = static_cast<const uint16_t*>(x.GetTensorRawData());
    for (size_t i = 0; i < inputs; ++i) staged[i] = half ? half_to_float(from[i]) : bfloat_to_float(from[i]);
    const float* results = staged.get() + inputs;
    status = multiply(context, staged.get(), tokens, staged.get() + inputs);
    auto* to = static_cast<uint16_t*>(y.GetTensorMutableRawData());
    for (size_t i = 0; i < outputs; ++i) to[i] = half ? Ort::Float16_t(results[i]).val : Ort::BFloat16_t(results[i]).val;
  }
  if (status != Status::kOk) fail(node_, "the kernel refused these sizes; check the model with `rankbook inspect`");
}

Status MatMulKernel::multiply(const Ort::KernelContext& context, const float* x, int64_t tokens, float* y) const {
  const float* bias = bias_.empty() ? nullptr : bias_.data();
  const CodebookWeight weight = weight_.bind(context);
  if (!kernels_.rounds) {
    const LowRankBranch branch = branch_.bind();
    const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(linear_workspace(weight, branch, tokens))]);
    return codebook_linear({weight, branch, bias, x, tokens, y, workspace.get()}, kernels_.floats, pool_of(context));
  }
  const IntegerWeight integer = integer_weight_->bind(weight);
  const IntegerBranch branch = integer_branch_.bind();
  const Workspace workspace(integer_workspace(integer, branch, tokens));
  return integer_linear({integer, branch, bias, x, tokens, y, workspace.get()}, kernels_.integers, pool_of(context));
}

GatherKernel::GatherKernel(const Constants& constants, int bits)
    : node_(constants.node()), weight_(constants, bits, Gather::kCodes) {}

OrtStatusPtr GatherKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

void GatherKernel::compute(const Ort::KernelContext& context) const {
  const Ort::ConstValue indices = context.GetInput(Gather::kIndices);
  std::vector<int64_t> shape = indices.GetTensorTypeAndShapeInfo().GetShape();
  GatherArgs args;
  args.weight = weight_.bind(context);
  args.indices = indices.GetTensorData<int64_t>();
  args.count = product(shape, shape.size());
  shape.push_back(args.weight.in_features);
  args.y = context.GetOutput(0, shape).GetTensorMutableData<float>();
  const Status status = codebook_gather(args, pool_of(context));
  if (status == Status::kBadIndex) {
    fail(node_, "an index lies outside [0, " + std::to_string(args.weight.out_features) + ")");
  }
  if (status != Status::kOk) fail(node_, "the kernel refused these sizes; check the model with `rankbook inspect`");
}

void add_operators(Ort::CustomOpDomain& domain, const Kernels& kernels) {
  auto& operators = *new std::list<Op>;
  const auto add = [&](auto... arguments) { domain.Add(&operators.emplace_back(arguments...)); };
  const Kernels rounding{kernels.floats, kernels.integers, true, kernels.copy};
  for (const int bits : contract::kBits) {
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      add(Op::Kind::kMatMul, bits, MatMul::kSuffix, type, kernels);
      add(Op::Kind::kLowRank, bits, LowRank::kSuffix, type, kernels);
      add(Op::Kind::kMatMul, bits, RoundedMatMul::kSuffix, type, rounding);
      add(Op::Kind::kLowRank, bits, RoundedLowRank::kSuffix, type, rounding);
    }
    add(Op::Kind::kGather, bits, Gather::kSuffix, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kernels);
  }
}

}  // namespace rankbook::ort
