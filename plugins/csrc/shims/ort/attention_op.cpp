// rankbook::GroupQueryAttention and its two forms with a cache of 16-bit floats for ONNX Runtime on the CPU: shapes and
// lengths of a call checked against each other, then handed to kernels/cpu/attention as plain pointers. fp32 but for the
// cache; caches are (batch, kv heads, positions, size), written in place where past and present are one buffer.
//
// Their bodies are com.microsoft::GroupQueryAttention, whose inputs they take in the same order (plugins/attention.py), so
// that a file runs without the library too.
#include "shims/ort/attention_op.h"

#include <cmath>
#include <memory>
#include <string>

#include "contract.h"
#include "kernels/cpu/attention/attention.h"
#include "shims/ort/constants.h"
#include "shims/ort/guarded.h"
#include "shims/ort/pool.h"

namespace rankbook::ort {
namespace {

// Names, inputs and limits come from contract.h, generated from plugins/attention.py, so that the exporter and this
// file cannot disagree.
using Attention = contract::GroupQueryAttention;
using Half = contract::GroupQueryAttentionKV16;
using RotaryHalf = contract::GroupQueryAttentionRotaryKV16;

// The operators differ in the cache, and in what says whether there is a rotary embedding.
struct Form {
  const char* name;
  bool half;
  int rotary;  // 1 inside, 0 not; kByAttribute
};
inline constexpr int kByAttribute = -1;
constexpr Form kForms[] = {
    {Attention::kName, false, kByAttribute}, {Half::kName, true, 0}, {RotaryHalf::kName, true, 1}};

// Inputs have the same places in all of them.
static_assert(int{Half::kTotalSequenceLength} == Attention::kTotalSequenceLength && int{Half::kInputCount} == Attention::kCos);
static_assert(int{RotaryHalf::kPositionIds} == Attention::kPositionIds && int{RotaryHalf::kInputCount} == Attention::kInputCount);

// Attributes and tables are read when the node is created; a call reads shapes and pointers only.
class AttentionKernel {
 public:
  AttentionKernel(const OrtKernelInfo* info, const Form& form, const AttentionKernels& kernels);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    return guarded([&] { compute(Ort::KernelContext(context)); });
  }

 private:
  void read_tables(const Constants& constants);
  void compute(const Ort::KernelContext& context) const;
  void read_inputs(const Ort::KernelContext& context, AttentionArgs& args) const;
  Ort::ConstValue input(const Ort::KernelContext& context, size_t index, const Shape& sizes) const;
  [[noreturn]] void fail(const std::string& sentence) const {
    throw Ort::Exception(node_ + ": " + sentence, ORT_INVALID_ARGUMENT);
  }

  std::string node_;
  const AttentionKernels& kernels_;
  AttentionArgs fixed_;  // what all calls share
};

AttentionKernel::AttentionKernel(const OrtKernelInfo* info, const Form& form, const AttentionKernels& kernels)
    : kernels_(kernels) {
  const Constants constants(info, Attention::kInputs, form.name);
  const Ort::ConstKernelInfo read(info);
  node_ = constants.node();
  fixed_.half = form.half;
  fixed_.heads = constants.attribute(Attention::kNumHeads, 1);
  fixed_.kv_heads = constants.attribute(Attention::kKvNumHeads, 1);
  // -1 is all keys.
  fixed_.window = constants.attribute(Attention::kLocalWindowSize, -1);
  fixed_.scale = constants.float_attribute(Attention::kScale);
  // 0 for none: a cap of 0 would hide every score.
  fixed_.softcap = constants.float_attribute(Attention::kSoftcap);
  if (fixed_.heads % fixed_.kv_heads != 0) {
    fail("kv_num_heads = " + std::to_string(fixed_.kv_heads) + " does not divide num_heads = " + std::to_string(fixed_.heads));
  }
  // No key at all would be seen.
  if (fixed_.window == 0) fail("attribute local_window_size is 0; it must be positive, or -1 for all keys");
  // The number of inputs must agree with do_rotary: a node that names tables and does not turn its heads would compute
  // something else without a word.
  const bool asked = form.rotary == kByAttribute;
  const int64_t rotary = asked ? constants.attribute(Attention::kDoRotary, 0) : form.rotary;
  const size_t count = read.GetInputCount();
  const size_t expected = rotary == 1 ? size_t{Attention::kInputCount} : size_t{Attention::kCos};
  if (asked && (rotary > 1 || count != expected)) {
    fail("do_rotary is " + std::to_string(rotary) + " with " + std::to_string(count) + " inputs; it must be 1 with " +
         std::to_string(Attention::kInputCount) + " inputs, or 0 with " + std::to_string(Attention::kCos));
  }
  // Optional inputs of ONNX may be left out by an empty name; here the node needs all that it lists.
  constants.expect_inputs(asked ? count : expected);
  if (rotary == 1) read_tables(constants);
}

// Tables stay where ONNX Runtime has them: initializers live as long as their session.
// cos and sin are (positions, half a head).
void AttentionKernel::read_tables(const Constants& constants) {
  const Constant cos = constants.constant(Attention::kCos);
  const Constant sin = constants.constant(Attention::kSin);
  const int64_t size = cos.shape.at[1] * 2;
  if (cos.shape.axes != 2 || cos.shape.at[0] < 1 || size < 1 || size % Attention::kRotaryStep != 0) {
    fail("input cos has shape " + cos.shape.text() + "; it must be rows of half a head, whose size is a multiple of " +
         std::to_string(Attention::kRotaryStep) + " with a rotary embedding inside");
  }
  // One index of a position serves both.
  if (!(sin.shape == cos.shape)) fail("input sin has shape " + sin.shape.text() + "; it must be that of cos, " + cos.shape.text());
  if (cos.type != contract::Type::kFloat32 || sin.type != contract::Type::kFloat32) fail("inputs cos and sin must be float32");
  // The width of the tables gives the size of a head before any call, which the calls are then held to.
  fixed_.positions = cos.shape.at[0];
  fixed_.size = size;
  fixed_.cos = constants.tensor(Attention::kCos).GetTensorData<float>();
  fixed_.sin = constants.tensor(Attention::kSin).GetTensorData<float>();
}

// All sizes are checked against those of query: the loops trust them.
Ort::ConstValue AttentionKernel::input(const Ort::KernelContext& context, size_t index, const Shape& sizes) const {
  const Ort::ConstValue value = context.GetInput(index);
  const Shape found = shape_of(value);
  if (!(found == sizes)) {
    fail(std::string(Attention::kInputs[index]) + " has shape " + found.text() + "; it must have shape " + sizes.text());
  }
  return value;
}

// Order matters for the sentences: query fixes batch, tokens and heads, the past fixes the buffer, everything else must
// follow.
void AttentionKernel::read_inputs(const Ort::KernelContext& context, AttentionArgs& args) const {
  const Ort::ConstValue query = context.GetInput(Attention::kQuery);
  // (batch, tokens, heads times size).
  const Shape shape = shape_of(query);
  // Without tables the size of a head is only known to be a multiple of 8.
  const int64_t width = args.heads * (args.positions > 0 ? args.size : kHeadStep);
  if (shape.axes != 3 || shape.at[2] % width != 0 || shape.at[2] == 0 || (args.positions > 0 && shape.at[2] != width)) {
    fail("the last of three sizes of query must be num_heads times the size of a head, twice the width of cos if there is one"
         " and a multiple of 8; it has " + std::to_string(shape.axes) + " axes, the last of " + std::to_string(shape.at[2]));
  }
  args.batch = shape.at[0];
  args.tokens = shape.at[1];
  // Heads are side by side in the last axis.
  args.size = shape.at[2] / args.heads;
  args.query = query.GetTensorData<float>();
  // Heads of keys and values stand side by side in the last axis, as query's do.
  const Shape fresh{args.batch, args.tokens, args.kv_heads * args.size};
  args.key = input(context, Attention::kKey, fresh).GetTensorData<float>();
  args.value = input(context, Attention::kValue, fresh).GetTensorData<float>();
  const Ort::ConstValue past = context.GetInput(Attention::kPastKey);
  const Shape buffer = shape_of(past);
  const Shape wanted{args.batch, args.kv_heads, buffer.at[2], args.size};
  // All but the number of positions is known by now.
  if (!(buffer == wanted)) fail("past_key has shape " + buffer.text() + "; it must have shape " + wanted.text());
  args.past = buffer.at[2];
  args.past_key = past.GetTensorRawData();
  args.past_value = input(context, Attention::kPastValue, wanted).GetTensorRawData();
  args.last = input(context, Attention::kSeqlensK, {args.batch}).GetTensorData<int32_t>();
  const Ort::ConstValue total = context.GetInput(Attention::kTotalSequenceLength);
  if (total.GetTensorTypeAndShapeInfo().GetElementCount() != 1) fail("total_sequence_length must be one number");
  // In host memory: no GPU takes part.
  args.total = *total.GetTensorData<int32_t>();
  // A past with room for more positions than are used is a static cache; the present then has its length.
  args.present = args.total > args.past ? args.total : args.past;
  if (args.positions > 0) {
    args.position_ids = input(context, Attention::kPositionIds, {args.batch, args.tokens}).GetTensorData<int64_t>();
  }
}

// The present may be the past's buffer, bound so by the runner: then nothing is copied (kernels/cpu/attention).
void AttentionKernel::compute(const Ort::KernelContext& context) const {
  AttentionArgs args = fixed_;
  read_inputs(context, args);
  // 0 in the file means the usual 1 / sqrt(size), as in ONNX Runtime's node.
  if (args.scale == 0.0F) args.scale = 1.0F / std::sqrt(static_cast<float>(args.size));
  const int64_t output[] = {args.batch, args.tokens, args.heads * args.size};
  const int64_t present[] = {args.batch, args.kv_heads, args.present, args.size};
  args.output = context.GetOutput(Attention::kOutput, output, 3).GetTensorMutableData<float>();
  args.present_key = context.GetOutput(Attention::kPresentKey, present, 4).GetTensorMutableRawData();
  args.present_value = context.GetOutput(Attention::kPresentValue, present, 4).GetTensorMutableRawData();
  // Panels of keys for prompts; a decode step needs none, and allocates nothing.
  const int64_t floats = attention_workspace(args);
  const std::unique_ptr<float[]> workspace(floats > 0 ? new float[static_cast<size_t>(floats)] : nullptr);
  args.workspace = workspace.get();
  const Status status = attention(args, kernels_, pool_of(context));
  if (status.ok()) return;
  // The kernels' sentences are general; here the numbers of this call are at hand.
  if (status == refusal::kPosition) {
    fail("a position lies outside [0, " + std::to_string(args.positions) + "), the rows of cos");
  }
  if (status == refusal::kHead) {
    fail("heads of " + std::to_string(args.size) + " elements; they must be a multiple of " + std::to_string(kHeadStep) +
         " up to " + std::to_string(kLargestHead));
  }
  fail("seqlens_k and total_sequence_length = " + std::to_string(args.total) + " do not fit " + std::to_string(args.tokens) +
       " new tokens in rows of " + std::to_string(args.past) +
       " past positions; several tokens continue a cache in a batch of one only");
}

struct Op : Ort::CustomOpBase<Op, AttentionKernel, true> {
  const Form& form;
  const AttentionKernels& kernels;

  Op(const Form& form_, const AttentionKernels& kernels_) : form(form_), kernels(kernels_) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new AttentionKernel(info, form, kernels); });
  }
  const char* GetName() const { return form.name; }
  size_t GetInputTypeCount() const { return form.rotary == 0 ? size_t{Attention::kCos} : size_t{Attention::kInputCount}; }
  ONNXTensorElementDataType cache() const {
    return form.half ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    if (input == Attention::kPositionIds) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    if (input == Attention::kPastKey || input == Attention::kPastValue) return cache();
    const bool length = input == Attention::kSeqlensK || input == Attention::kTotalSequenceLength;
    return length ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  // With the attribute, tables and positions are there with do_rotary = 1 only; the constructor has looked at their number.
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t input) const {
    return form.rotary == kByAttribute && input >= Attention::kCos ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return Attention::kOutputCount; }
  ONNXTensorElementDataType GetOutputType(size_t output) const {
    return output == Attention::kOutput ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : cache();
  }
};

// The same limits stand in Python and in the kernels.
static_assert(Attention::kLargestHead == kLargestHead && Attention::kHeadStep == kHeadStep);

}  // namespace

// Never deleted: a domain keeps the pointer for as long as the library is loaded.
void add_attention(Ort::CustomOpDomain& domain, const AttentionKernels& kernels) {
  for (const Form& form : kForms) domain.Add(new Op(form, kernels));
}

}  // namespace rankbook::ort
