// AddRMSNormalization and SwiGLU for ONNX Runtime on the CPU: one node each for what is otherwise a chain of nodes over
// rows of a few hundred elements, which take several times their arithmetic. fp32; sizes are checked here, loops are
// kernels/cpu/rows.
//
// Exported by --graph ort; their bodies are the standard nodes (plugins/rows.py).
#include "shims/ort/row_ops.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "contract.h"
#include "shims/ort/constants.h"
#include "shims/ort/guarded.h"
#include "shims/ort/pool.h"

namespace rankbook::ort {
namespace {

using Norm = contract::AddRMSNormalization;
using Gate = contract::SwiGLU;

constexpr int64_t kTaskElements = 1 << 15;  // elements that one task handles at least: waking a thread costs more than fewer

// Runs work(from, to) over pieces of [0, count), each a multiple of `step` elements.
// Pieces of whole rows for the norm, of any elements for the gate; a decode step of a small model is one piece and
// wakes nobody.
template <class Work>
void in_pieces(const Ort::KernelContext& context, int64_t count, int64_t step, Work work) {
  // Rounded up to whole rows, which a norm cannot share out.
  const int64_t piece = ceil_div(kTaskElements, step) * step;
  if (count <= piece) return work(0, count);
  // On the stack of the caller, which waits until the last piece is done.
  struct Job {
    Work& work;
    int64_t count, piece;
  } job{work, count, piece};
  // The pool takes a function and a pointer: the lambda captures nothing, all that it needs is in `job`.
  const auto task = [](void* argument, int64_t index) {
    const Job& all = *static_cast<const Job*>(argument);
    const int64_t to = (index + 1) * all.piece;
    all.work(index * all.piece, to < all.count ? to : all.count);
  };
  run_tasks(const_cast<Ort::KernelContext*>(&context), ceil_div(count, piece), task, &job);
}

// sum = a + b and y = norm(sum): two outputs, because the sum is the residual that goes on.
// Rows are normalized one by one; sizes in front of the last axis do not matter.
class NormKernel {
 public:
  NormKernel(const OrtKernelInfo* info, const RowKernels& kernels) : kernels_(kernels) {
    const Constants constants(info, Norm::kInputs, Norm::kName);
    node_ = constants.node();
    constants.expect_inputs(Norm::kInputCount);
    // The scale is an initializer, checked once; NaN in it would otherwise reach every token.
    epsilon_ = constants.float_attribute(Norm::kEpsilon);
    const Constant scale = constants.constant(Norm::kScale);
    // The length of the scale is that of a row, and every call is held to it.
    size_ = scale.shape.at[0];
    if (scale.shape.axes != 1 || size_ < 1 || scale.type != contract::Type::kFloat32) {
      constants.fail("input scale has shape " + scale.shape.text() + "; it must be float32 of one axis, and hold at least one element");
    }
    scale_ = constants.tensor(Norm::kScale).GetTensorData<float>();  // initializers live as long as their session
    if (!std::all_of(scale_, scale_ + size_, [](float value) { return std::isfinite(value); })) {
      constants.fail("input scale holds NaN or infinity; the file is damaged: write or copy it again");
    }
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  void compute(const Ort::KernelContext& context) const {
    const Ort::ConstValue a = context.GetInput(Norm::kA);
    const Ort::ConstValue b = context.GetInput(Norm::kB);
    const Shape sizes = shape_of(a);
    // No broadcasting: a and b are the same hidden states at two places of a block.
    const Shape other = shape_of(b);
    if (!(sizes == other) || !sizes.has(1) || sizes.last() != size_) {
      // Shapes of a call are checked in the call, as graphs have symbolic ones.
      throw Ort::Exception(node_ + ": a has shape " + sizes.text() + " and b " + other.text() + "; both must be (..., " +
                               std::to_string(size_) + ")",
                           ORT_INVALID_ARGUMENT);
    }
    const auto* left = a.GetTensorData<float>();
    const auto* right = b.GetTensorData<float>();
    auto* y = context.GetOutput(Norm::kY, sizes.at.data(), sizes.axes).GetTensorMutableData<float>();
    // The shape of both outputs is that of a; ONNX Runtime gives memory for them here.
    auto* sum = context.GetOutput(Norm::kSum, sizes.at.data(), sizes.axes).GetTensorMutableData<float>();
    in_pieces(context, sizes.count(), size_, [&](int64_t from, int64_t to) {
      // `sum` is read again by add_norm's second pass, from the first-level cache.
      for (int64_t at = from; at < to; at += size_) {
        kernels_.add_norm(left + at, right + at, scale_, size_, epsilon_, y + at, sum + at);
      }
    });
  }

  const RowKernels& kernels_;
  std::string node_;
  float epsilon_ = 0.0F;
  int64_t size_ = 0;
  const float* scale_ = nullptr;
};

// gate * sigmoid(gate) * up, the middle of Llama's feed-forward network.
class GateKernel {
 public:
  GateKernel(const OrtKernelInfo* info, const RowKernels& kernels)
      : kernels_(kernels) {
    const Constants constants(info, Gate::kInputs, Gate::kName);
    // No attributes: the gate's function is in the name.
    constants.expect_inputs(Gate::kInputCount);
    node_ = constants.node();
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  void compute(const Ort::KernelContext& context) const {
    const Ort::ConstValue gate = context.GetInput(Gate::kGate);
    const Ort::ConstValue up = context.GetInput(Gate::kUp);
    const Shape sizes = shape_of(gate);
    const Shape other = shape_of(up);
    // A scalar is a row of one element.
    if (!(sizes == other) || !sizes.has(0)) {
      throw Ort::Exception(node_ + ": gate has shape " + sizes.text() + " and up " + other.text() + "; they must be the same",
                           ORT_INVALID_ARGUMENT);
    }
    const auto* left = gate.GetTensorData<float>();
    const auto* right = up.GetTensorData<float>();
    auto* y = context.GetOutput(Gate::kY, sizes.at.data(), sizes.axes).GetTensorMutableData<float>();
    in_pieces(context, sizes.count(), 1, [&](int64_t from, int64_t to) {
      // One pass over both inputs: bound by memory for prompts, by the call for a token.
      kernels_.swiglu(left + from, right + from, to - from, y + from);
    });
  }

  const RowKernels& kernels_;
  std::string node_;
};

// fp32 alone: models in other types keep the standard nodes, which the bodies of both operators are.
template <class Operator, class Kernel>
struct Op : Ort::CustomOpBase<Op<Operator, Kernel>, Kernel, true> {
  const RowKernels& kernels;

  explicit Op(const RowKernels& kernels_) : kernels(kernels_) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(info, kernels); });
  }
  const char* GetName() const { return Operator::kName; }
  size_t GetInputTypeCount() const { return Operator::kInputCount; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return Operator::kOutputCount; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

void add_row_operators(Ort::CustomOpDomain& domain, const RowKernels& kernels) {
  // Never deleted, as those of ops.cpp.
  domain.Add(new Op<Norm, NormKernel>(kernels));
  domain.Add(new Op<Gate, GateKernel>(kernels));
}

}  // namespace rankbook::ort
