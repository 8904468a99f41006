#include "shims/ort/ops.h"

#include <list>
#include <vector>

#include "contract.h"
#include "kernels/cpu/simd/half.h"
#include "shims/ort/guarded.h"
#include "shims/ort/pool.h"

namespace rankbook::ort {
namespace {

using MatMul = contract::CodebookMatMul;
using LowRank = contract::CodebookMatMulLowRank;
using Gather = contract::CodebookGather;
using RoundedMatMul = contract::CodebookMatMulA8;
using RoundedLowRank = contract::CodebookMatMulLowRankA8;

[[noreturn]] void fail(const std::string& node, const std::string& sentence) {
  throw Ort::Exception(node + ": " + sentence, ORT_INVALID_ARGUMENT);
}

// Memory on a cache line: on the stack where it is little, as for a single token, since malloc costs more there than rounding.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : held_(bytes > kFew ? new uint8_t[static_cast<size_t>(bytes) + kLine] : nullptr) {}
  uint8_t* get() {
    uint8_t* const from = held_ ? held_.get() : few_;
    return from + (kLine - reinterpret_cast<uintptr_t>(from) % kLine) % kLine;
  }

 private:
  static constexpr int64_t kFew = 16384;
  static constexpr size_t kLine = 64;
  std::unique_ptr<uint8_t[]> held_;
  uint8_t few_[static_cast<size_t>(kFew) + kLine];
};

// One operator at one width and one type of activations.
struct Op : Ort::CustomOpBase<Op, MatMulKernel, true> {
  enum class Kind { kMatMul, kLowRank, kGather };

  Kind kind;
  int bits;
  int merged;  // products of a merged operator; 0 in others, which have one
  ONNXTensorElementDataType type;
  std::string name;
  const Kernels kernels;

  Op(Kind kind_, int bits_, const char* suffix, int merged_, ONNXTensorElementDataType type_, const Kernels& kernels_)
      : kind(kind_), bits(bits_), merged(merged_), type(type_), kernels(kernels_) {
    name = (kind == Kind::kGather ? Gather::kName : kind == Kind::kLowRank ? LowRank::kName : MatMul::kName);
    name += std::to_string(bits) + suffix;
    if (merged > 0) name += contract::kMerged + std::to_string(merged);
    if (kind != Kind::kGather) return;
    KernelDestroy = [](void* kernel) { delete static_cast<GatherKernel*>(kernel); };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<GatherKernel*>(kernel)->ComputeV2(context);
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] {
      if (kind == Kind::kGather) {
        const Constants constants(info, Gather::kInputs, name);
        constants.expect_inputs(inputs_alone());
        *kernel = new GatherKernel(constants, bits);
      } else {
        std::string node = Constants(info, LowRank::kInputs, name).node();
        if (merged == 0 && Constants::are_cast(info)) {
          auto held = std::make_shared<Ort::KernelInfo>(Ort::ConstKernelInfo(info).Copy());
          auto read = [this, held](const Ort::KernelContext& context) { return read_products(*held, &context); };
          *kernel = new MatMulKernel({}, std::move(read), std::move(node), kernels);
        } else {
          *kernel = new MatMulKernel(read_products(info, nullptr), nullptr, std::move(node), kernels);
        }
      }
    });
  }

  // From the initializers of a node, or from the inputs of a call.
  std::vector<Product> read_products(const OrtKernelInfo* info, const Ort::KernelContext* context) const {
    std::vector<Product> out;
    std::vector<Constants> constants;
    for (int i = 0; i < products(); ++i) {
      constants.emplace_back(info, LowRank::kInputs, name, merged > 0 ? i : Constants::kAlone, context);
      constants[i].expect_inputs(merged > 0 ? 2 : inputs_alone());
      out.emplace_back(constants[i], constants[i].layer(bits, inputs_alone(), kCpuLimits), kernels);
      if (out[0].in_features() != out[i].in_features() || (kernels.rounds && out[0].groups() != out[i].groups())) {
        constants[i].fail("all products must have the same in_features and, where activations are rounded, the same groups");
      }
    }
    if (kernels.copy && context == nullptr) Product::copy(out, constants);
    return out;
  }

  int products() const { return merged > 0 ? merged : 1; }

  size_t inputs_alone() const {
    return kind == Kind::kGather    ? size_t{Gather::kInputCount}
           : kind == Kind::kLowRank ? size_t{LowRank::kInputCount}
                                    : size_t{MatMul::kInputCount};
  }

  const char* GetName() const { return name.c_str(); }
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

static_assert(MatMul::kCodes == static_cast<int>(Gather::kCodes) && MatMul::kBase == static_cast<int>(Gather::kBase));
static_assert(MatMul::kInputCount == static_cast<int>(RoundedMatMul::kInputCount));
static_assert(LowRank::kInputCount == static_cast<int>(RoundedLowRank::kInputCount));
static_assert(contract::kMostMerged <= kMostProducts);

}  // namespace

MatMulKernel::MatMulKernel(std::vector<Product> products, Read read, std::string node, const Kernels& kernels)
    : products_(std::move(products)), read_(std::move(read)), node_(std::move(node)), kernels_(kernels) {}

OrtStatusPtr MatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

struct MatMulKernel::Call {
  const Ort::KernelContext& context;
  const std::vector<Product>& products;
  int64_t tokens;
  const float* x = nullptr;
  float* y[kMostProducts] = {};
};

void MatMulKernel::compute(const Ort::KernelContext& context) const {
  const std::vector<Product> read = read_ ? read_(context) : std::vector<Product>();
  const std::vector<Product>& products = read_ ? read : products_;
  const Ort::ConstValue x = context.GetInput(MatMul::kX);
  const auto info = x.GetTensorTypeAndShapeInfo();
  Shape shape = shape_of(info);
  const int64_t in_features = products[0].in_features();
  if (!shape.has(1) || shape.last() != in_features) {
    fail(node_, "x has shape " + shape.text() + "; its last size must be in_features = " + std::to_string(in_features));
  }
  Call call{context, products, shape.count(shape.axes - 1)};
  void* results[kMostProducts] = {};
  for (size_t i = 0; i < products.size(); ++i) {
    shape.last() = products[i].out_features();
    results[i] = context.GetOutput(i, shape.at.data(), shape.axes).GetTensorMutableRawData();
  }
  const auto type = info.GetElementType();
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return compute_half(call, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, x.GetTensorRawData(), results);
  }
  call.x = x.GetTensorData<float>();
  for (size_t i = 0; i < products.size(); ++i) call.y[i] = static_cast<float*>(results[i]);
  multiply(call);
}

// The same for fp16 or bf16, by way of fp32.
void MatMulKernel::compute_half(Call& call, bool half, const void* x, void* const* results) const {
  const std::vector<Product>& products = call.products;
  const auto inputs = static_cast<size_t>(call.tokens * products[0].in_features());
  size_t outputs = 0;
  for (const Product& each : products) outputs += static_cast<size_t>(call.tokens * each.out_features());
  const std::unique_ptr<float[]> staged(new float[inputs + outputs]);
  const auto* from = static_cast<const uint16_t*>(x);
  for (size_t i = 0; i < inputs; ++i) staged[i] = half ? half_to_float(from[i]) : bfloat_to_float(from[i]);
  call.x = staged.get();
  float* next = staged.get() + inputs;
  for (size_t i = 0; i < products.size(); ++i) {
    call.y[i] = next;
    next += call.tokens * products[i].out_features();
  }
  multiply(call);
  for (size_t i = 0; i < products.size(); ++i) {
    auto* to = static_cast<uint16_t*>(results[i]);
    const int64_t count = call.tokens * products[i].out_features();
    for (int64_t j = 0; j < count; ++j) to[j] = half ? Ort::Float16_t(call.y[i][j]).val : Ort::BFloat16_t(call.y[i][j]).val;
  }
}

void MatMulKernel::multiply(const Call& call) const {
  const std::vector<Product>& made = call.products;
  const Parallel pool = pool_of(call.context);
  Status status;
  if (kernels_.rounds) {
    Int8Product products[kMostProducts];
    for (size_t i = 0; i < made.size(); ++i) {
      products[i] = made[i].int8(call.context);
      products[i].y = call.y[i];
    }
    Int8Args args{products, static_cast<int>(made.size()), call.x, call.tokens};
    Workspace workspace(int8_workspace(args));
    args.workspace = workspace.get();
    status = int8_linear(args, kernels_.int8, pool);
  } else {
    for (size_t i = 0; i < made.size() && status.ok(); ++i) {
      LinearArgs args = made[i].floats(call.context);
      const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(linear_workspace(args.weight, args.branch, call.tokens))]);
      args.x = call.x;
      args.tokens = call.tokens;
      args.y = call.y[i];
      args.workspace = workspace.get();
      status = codebook_linear(args, kernels_.floats, pool);
    }
  }
  if (!status.ok()) fail(node_, status.message);
}

GatherKernel::GatherKernel(const Constants& constants, int bits)
    : node_(constants.node()), weight_(constants, constants.layer(bits, Gather::kInputCount, kCpuLimits)) {}

OrtStatusPtr GatherKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

void GatherKernel::compute(const Ort::KernelContext& context) const {
  const Ort::ConstValue indices = context.GetInput(Gather::kIndices);
  std::vector<int64_t> shape = indices.GetTensorTypeAndShapeInfo().GetShape();
  GatherArgs args;
  args.weight = weight_.bind(context);
  args.indices = indices.GetTensorData<int64_t>();
  args.count = static_cast<int64_t>(indices.GetTensorTypeAndShapeInfo().GetElementCount());
  shape.push_back(args.weight.in_features);
  args.y = context.GetOutput(0, shape).GetTensorMutableData<float>();
  const Status status = codebook_gather(args, pool_of(context));
  if (status == refusal::kIndex) {
    fail(node_, "an index lies outside [0, " + std::to_string(args.weight.out_features) + ")");
  }
  if (!status.ok()) fail(node_, status.message);
}

void add_operators(Ort::CustomOpDomain& domain, const Kernels& kernels) {
  auto& operators = *new std::list<Op>;
  const auto add = [&](const auto&... arguments) { domain.Add(&operators.emplace_back(arguments...)); };
  const Kernels rounding{kernels.floats, kernels.int8, true, kernels.copy};
  for (const int bits : contract::kBits) {
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
      for (int merged = 0; merged <= contract::kMostMerged; ++merged) {
        add(Op::Kind::kMatMul, bits, MatMul::kSuffix, merged, type, kernels);
        add(Op::Kind::kLowRank, bits, LowRank::kSuffix, merged, type, kernels);
        add(Op::Kind::kMatMul, bits, RoundedMatMul::kSuffix, merged, type, rounding);
        add(Op::Kind::kLowRank, bits, RoundedLowRank::kSuffix, merged, type, rounding);
      }
    }
    add(Op::Kind::kGather, bits, Gather::kSuffix, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kernels);
  }
}

}  // namespace rankbook::ort
