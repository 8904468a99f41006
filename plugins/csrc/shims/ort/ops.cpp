// The operators for packed layers on the CPU provider: what a node makes of its constants when it is created, and a
// call from ONNX Runtime's tensors to the kernels' arguments. x and y are (..., K) and (..., N) in fp32, fp16 or bf16.
//
// Two modes (rankbook.activations): exact fp32, kernels/cpu/packed; and activations rounded to 8 bits,
// kernels/cpu/int8, which takes all products of a node at once. cuda_ops.cpp is the same for a GPU.
#include "shims/ort/ops.h"

#include <list>
#include <vector>

#include "contract.h"
#include "shims/ort/guarded.h"
#include "shims/ort/memory.h"
#include "shims/ort/pool.h"
#include "shims/ort/signature.h"

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

// A product or a look-up on the CPU. ONNX Runtime's template makes the two callbacks for one kind of kernel; for
// look-ups they are replaced.
struct Op : SignedOp<Op, MatMulKernel> {
  const Kernels kernels;

  Op(const Signature& of, const Kernels& kernels_) : SignedOp(of), kernels(kernels_) {
    if (signature.kind != Kind::kGather) return;
    KernelDestroy = [](void* kernel) { delete static_cast<GatherKernel*>(kernel); };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<GatherKernel*>(kernel)->ComputeV2(context);
    };
  }

  // Called when a session is made: everything that can be refused is refused here, with the node's name, before any
  // token.
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] {
      const Constants constants(info, signature.input_names(), name);
      if (signature.kind == Kind::kGather) {
        constants.expect_inputs(signature.inputs_alone());
        *kernel = new GatherKernel(constants, signature.bits);
      } else {
        if (signature.merged == 0 && Constants::are_cast(info)) {
          auto held = std::make_shared<Ort::KernelInfo>(Ort::ConstKernelInfo(info).Copy());
          auto read = [this, held](const Ort::KernelContext& context) { return read_products(*held, &context); };
          *kernel = new MatMulKernel({}, std::move(read), constants.node(), kernels);
        } else {
          *kernel = new MatMulKernel(read_products(info, nullptr), nullptr, constants.node(), kernels);
        }
      }
    });
  }

  // From the initializers of a node, or from the inputs of a call. A merged node has products 0, 1, 2 whose constants are
  // named with a suffix; others have one without.
  std::vector<Product> read_products(const OrtKernelInfo* info, const Ort::KernelContext* context) const {
    std::vector<Product> out;
    std::vector<Constants> constants;
    const size_t inputs = signature.inputs_alone();
    for (int i = 0; i < signature.products(); ++i) {
      constants.emplace_back(info, signature.input_names(), name, signature.which(i), context);
      constants[i].expect_inputs(signature.merged > 0 ? 2 : inputs);
      out.emplace_back(constants[i], constants[i].layer(signature.bits, inputs, kCpuLimits), kernels);
      if (out[0].in_features() != out[i].in_features() || (kernels.rounds && out[0].groups() != out[i].groups())) {
        constants[i].fail("all products must have the same in_features and, where activations are rounded, the same groups");
      }
    }
    // After all constants were read: copying gives pages of the file back.
    if (kernels.copy && context == nullptr) Product::copy(out, constants);
    return out;
  }
};

// One reader serves all kinds because their constants stand at the same positions.
static_assert(MatMul::kCodes == static_cast<int>(Gather::kCodes) && MatMul::kBase == static_cast<int>(Gather::kBase));
static_assert(MatMul::kInputCount == static_cast<int>(RoundedMatMul::kInputCount));
static_assert(LowRank::kInputCount == static_cast<int>(RoundedLowRank::kInputCount));
static_assert(contract::kMostMerged <= kMostProducts);

}  // namespace

MatMulKernel::MatMulKernel(std::vector<Product> products, Read read, std::string node, const Kernels& kernels)
    : products_(std::move(products)), read_(std::move(read)), node_(std::move(node)), kernels_(kernels) {}

// An exception would end the process in ONNX Runtime's C code.
OrtStatusPtr MatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

// x and every y in fp32, whatever their types outside.
struct MatMulKernel::Call {
  const Ort::KernelContext& context;
  const std::vector<Product>& products;
  int64_t tokens;
  const float* x = nullptr;
  float* y[kMostProducts] = {};
};

// Nothing is allocated for fp32: shapes are in fixed arrays, outputs are ONNX Runtime's.
void MatMulKernel::compute(const Ort::KernelContext& context) const {
  // Nothing is read anew where constants were initializers.
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
  // fp32 goes straight through, without a copy.
  call.x = x.GetTensorData<float>();
  for (size_t i = 0; i < products.size(); ++i) call.y[i] = static_cast<float*>(results[i]);
  multiply(call);
}

// The same for fp16 or bf16, by way of fp32.
// For one token the conversion is K + N elements beside N K weights.
void MatMulKernel::compute_half(Call& call, bool half, const void* x, void* const* results) const {
  const std::vector<Product>& products = call.products;
  const auto inputs = static_cast<size_t>(call.tokens * products[0].in_features());
  size_t outputs = 0;
  for (const Product& each : products) outputs += static_cast<size_t>(call.tokens * each.out_features());
  const std::unique_ptr<float[]> staged(new float[inputs + outputs]);
  widen(x, half, static_cast<int64_t>(inputs), staged.get());
  call.x = staged.get();
  float* next = staged.get() + inputs;
  for (size_t i = 0; i < products.size(); ++i) {
    call.y[i] = next;
    next += call.tokens * products[i].out_features();
  }
  multiply(call);
  for (size_t i = 0; i < products.size(); ++i) narrow(call.y[i], half, call.tokens * products[i].out_features(), results[i]);
}

// The kernels return a sentence, which gets the node's name here.
void MatMulKernel::multiply(const Call& call) const {
  // The session's own threads, so that --threads and other nodes' threads are the same ones.
  const std::vector<Product>& made = call.products;
  const Parallel pool = pool_of(call.context);
  Status status;
  // All products at once: x is rounded once, and threads go through the panels of all of them. Arrays on the stack: up to
  // three products, no allocation for a token.
  const auto count = static_cast<int64_t>(made.size());
  if (kernels_.rounds) {
    Int8Product products[kMostProducts];
    for (size_t i = 0; i < made.size(); ++i) {
      products[i] = made[i].int8(call.context);
      products[i].y = call.y[i];
    }
    const Int8Args args{products, static_cast<int>(count), call.x, call.tokens, nullptr};
    Workspace workspace(int8_workspace(&args, 1));
    status = int8_linear(&args, 1, workspace.get(), kernels_.int8, pool);
  } else {
    LinearArgs products[kMostProducts];
    for (size_t i = 0; i < made.size(); ++i) {
      products[i] = made[i].floats(call.context);
      products[i].x = call.x;
      products[i].tokens = call.tokens;
      products[i].y = call.y[i];
    }
    Workspace workspace(linear_workspace(products, count));
    status = codebook_linear(products, count, workspace.get(), kernels_.floats, pool);
  }
  if (!status.ok()) fail(node_, status.message);
}

// Embeddings are read where the file has them: a token touches a row of some hundred bytes, for which a copy would not
// pay.
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
  // Indices come as int64 only; their shape is that of y but for the last axis.
  args.y = context.GetOutput(0, shape).GetTensorMutableData<float>();
  const Status status = codebook_gather(args, pool_of(context));
  // Which index it was, nobody says: the kernel stops at the first, and the range tells enough.
  if (status == refusal::kIndex) {
    fail(node_, "an index lies outside [0, " + std::to_string(args.weight.out_features) + ")");
  }
  if (!status.ok()) fail(node_, status.message);
}

// Names that end in A8 round x whatever the session says; the others do as `kernels` says.
void add_operators(Ort::CustomOpDomain& domain, const Kernels& kernels) {
  // A list, whose elements never move: ONNX Runtime keeps their addresses. Never destroyed, as sessions may outlive
  // static objects.
  auto& operators = *new std::list<Op>;
  const Kernels rounding{kernels.floats, kernels.int8, true, kernels.copy};
  each_signature([&](const Signature& each) {
    domain.Add(&operators.emplace_back(each, each.int8_activations ? rounding : kernels));
  });
}

}  // namespace rankbook::ort
