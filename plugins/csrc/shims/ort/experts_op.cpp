// Products of experts for ONNX Runtime on the CPU: rows sorted by expert, then one product for each expert that has rows,
// all of them at once (kernels/cpu/tasks.h). What no row was sent to is not read.
//
// Each expert is a Product of its own, made of its slices of the node's constants when the node is created.
#include "shims/ort/experts_op.h"

#include <functional>
#include <list>
#include <string>
#include <vector>

#include "contract.h"
#include "shims/ort/guarded.h"
#include "shims/ort/memory.h"
#include "shims/ort/pool.h"
#include "shims/ort/signature.h"

namespace rankbook::ort {
namespace {

using Names = contract::CodebookExperts;  // every kind has its first inputs

// The rows of each expert: those of expert e are order[starts[e]] ... order[starts[e + 1] - 1], in their order.
struct SortedRows {
  std::vector<int64_t> order, starts;

  // False where a number lies outside [0, experts).
  bool sort(const int64_t* numbers, int64_t rows, size_t experts) {
    starts.assign(experts + 1, 0);
    order.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
      if (numbers[row] < 0 || numbers[row] >= static_cast<int64_t>(experts)) return false;
      ++starts[static_cast<size_t>(numbers[row]) + 1];
    }
    for (size_t expert = 0; expert < experts; ++expert) starts[expert + 1] += starts[expert];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t row = 0; row < rows; ++row) order[static_cast<size_t>(next[static_cast<size_t>(numbers[row])]++)] = row;
    return true;
  }
};

class ExpertsKernel {
 public:
  using Read = std::function<std::vector<Product>(const Ort::KernelContext&)>;

  // `products` are those of all experts. Without any, `read` reads them in each call, as in MatMulKernel.
  ExpertsKernel(std::vector<Product> products, Read read, std::string node, const Kernels& kernels)
      : products_(std::move(products)), read_(std::move(read)), node_(std::move(node)), kernels_(kernels) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  void compute(const Ort::KernelContext& context) const;
  Status multiply(const Ort::KernelContext& context, const std::vector<Product>& products, const SortedRows& sorted,
                  const float* x, float* y) const;
  [[noreturn]] void fail(const std::string& sentence) const {
    throw Ort::Exception(node_ + ": " + sentence, ORT_INVALID_ARGUMENT);
  }

  std::vector<Product> products_;
  Read read_;
  std::string node_;
  const Kernels kernels_;
};

void ExpertsKernel::compute(const Ort::KernelContext& context) const {
  const std::vector<Product> read = read_ ? read_(context) : std::vector<Product>();
  const std::vector<Product>& products = read_ ? read : products_;
  const Ort::ConstValue x = context.GetInput(Names::kX);
  const Ort::ConstValue numbers = context.GetInput(Names::kExperts);
  const auto info = x.GetTensorTypeAndShapeInfo();
  const Shape shape = shape_of(info);
  const int64_t k = products[0].in_features();
  if (shape.axes != 2 || shape.last() != k) {
    fail("x has shape " + shape.text() + "; it must be (rows, in_features) with in_features = " + std::to_string(k));
  }
  const int64_t rows = shape.at[0];
  if (const Shape given = shape_of(numbers); !(given == Shape{rows})) {
    fail("experts has shape " + given.text() + "; it must be (" + std::to_string(rows) + "), one number for each row of x");
  }
  SortedRows sorted;
  if (!sorted.sort(numbers.GetTensorData<int64_t>(), rows, products.size())) {
    fail("the number of an expert lies outside [0, " + std::to_string(products.size()) + ")");
  }
  const Shape result{rows, products[0].out_features()};
  void* const y = context.GetOutput(0, result.at.data(), result.axes).GetTensorMutableRawData();
  Status status;
  if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    status = multiply(context, products, sorted, x.GetTensorData<float>(), static_cast<float*>(y));
  } else {
    const bool half = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    const std::unique_ptr<float[]> staged(new float[static_cast<size_t>(shape.count() + result.count())]);
    widen(x.GetTensorRawData(), half, shape.count(), staged.get());
    status = multiply(context, products, sorted, staged.get(), staged.get() + shape.count());
    if (status.ok()) narrow(staged.get() + shape.count(), half, result.count(), y);
  }
  if (!status.ok()) fail(status.message);
}

// Rows are neither gathered nor scattered: the kernels take the numbers of those that belong to a product.
Status ExpertsKernel::multiply(const Ort::KernelContext& context, const std::vector<Product>& products,
                               const SortedRows& sorted, const float* x, float* y) const {
  std::vector<LinearArgs> exact;
  std::vector<Int8Product> rounded;
  std::vector<Int8Args> args;
  rounded.reserve(products.size());  // args point into it
  for (size_t expert = 0; expert < products.size(); ++expert) {
    const int64_t tokens = sorted.starts[expert + 1] - sorted.starts[expert];
    if (tokens == 0) continue;
    const int64_t* const rows = sorted.order.data() + sorted.starts[expert];
    if (kernels_.rounds) {
      rounded.push_back(products[expert].int8(context));
      rounded.back().y = y;
      args.push_back({&rounded.back(), 1, x, tokens, rows});
    } else {
      LinearArgs& one = exact.emplace_back(products[expert].floats(context));
      one.x = x;
      one.tokens = tokens;
      one.y = y;
      one.rows = rows;
    }
  }
  const auto count = static_cast<int64_t>(kernels_.rounds ? args.size() : exact.size());
  Workspace workspace(kernels_.rounds ? int8_workspace(args.data(), count) : linear_workspace(exact.data(), count));
  const Parallel pool = pool_of(context);
  return kernels_.rounds ? int8_linear(args.data(), count, workspace.get(), kernels_.int8, pool)
                         : codebook_linear(exact.data(), count, workspace.get(), kernels_.floats, pool);
}

struct ExpertsOp : SignedOp<ExpertsOp, ExpertsKernel> {
  const Kernels kernels;

  ExpertsOp(const Signature& of, const Kernels& kernels_) : SignedOp(of), kernels(kernels_) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] {
      const Which first{Which::kExpert, 0};
      const std::string node = Constants(info, signature.input_names(), name, first).node();
      if (Constants::are_cast(info, first)) {
        auto held = std::make_shared<Ort::KernelInfo>(Ort::ConstKernelInfo(info).Copy());
        auto read = [this, held](const Ort::KernelContext& context) { return read_products(*held, &context); };
        *kernel = new ExpertsKernel({}, std::move(read), node, kernels);
      } else {
        *kernel = new ExpertsKernel(read_products(info, nullptr), nullptr, node, kernels);
      }
    });
  }

  std::vector<Product> read_products(const OrtKernelInfo* info, const Ort::KernelContext* context) const {
    const size_t inputs = signature.inputs_alone();
    const Constants all(info, signature.input_names(), name, {Which::kExpert, 0}, context);
    all.expect_inputs(inputs + 1);
    all.expect_type(Names::kExperts, Names::kInputs[Names::kExperts], contract::Type::kInt64);
    int64_t experts = 0;
    const Layer layer = all.layer(signature.bits, inputs, kCpuLimits, &experts);
    std::vector<Product> out;
    std::vector<Constants> constants;
    for (int64_t expert = 0; expert < experts; ++expert) {
      constants.emplace_back(info, signature.input_names(), name, Which{Which::kExpert, expert}, context);
      out.emplace_back(constants.back(), layer, kernels);
    }
    if (kernels.copy && context == nullptr) Product::copy(out, constants);
    return out;
  }
};

// The first input is x, as in the products of one; the constants stand one behind where they stand there.
static_assert(Names::kCodes == static_cast<int>(contract::CodebookMatMul::kCodes) + 1);
static_assert(contract::CodebookExpertsLowRank::kInputCount == static_cast<int>(contract::CodebookMatMulLowRank::kInputCount) + 1);

}  // namespace

void add_experts(Ort::CustomOpDomain& domain, const Kernels& kernels) {
  auto& operators = *new std::list<ExpertsOp>;
  const Kernels rounding{kernels.floats, kernels.int8, true, kernels.copy};
  each_experts_signature([&](const Signature& each) {
    domain.Add(&operators.emplace_back(each, each.int8_activations ? rounding : kernels));
  });
}

}  // namespace rankbook::ort
