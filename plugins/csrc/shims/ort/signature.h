#pragma once

// What an operator for packed layers is called, takes and gives: the same on every provider, so that a file runs on both.

#include <string>

#include "contract.h"
#include "shims/ort/api.h"
#include "shims/ort/constants.h"

namespace rankbook::ort {

enum class Kind { kMatMul, kLowRank, kGather };

// One operator at one width and one type of activations.
struct Signature {
  Kind kind;
  int bits;
  ONNXTensorElementDataType type;
  bool int8_activations;  // its name ends in A8
  int merged;             // products of a merged operator; 0 in others, which have one
  bool experts = false;   // constants of all experts, one behind the other

  int products() const { return merged > 0 ? merged : 1; }
  // The product whose constants are read: of experts those of the first, where all of them begin.
  Which which(int product) const { return {merged > 0 ? Which::kMerged : experts ? Which::kExpert : Which::kAlone, product}; }

  // Inputs of one product where it is a node of its own.
  size_t inputs_alone() const {
    return kind == Kind::kGather    ? size_t{contract::CodebookGather::kInputCount}
           : kind == Kind::kLowRank ? size_t{contract::CodebookMatMulLowRank::kInputCount}
                                    : size_t{contract::CodebookMatMul::kInputCount};
  }

  const char* const* input_names() const {
    return kind == Kind::kGather ? contract::CodebookGather::kInputs : contract::CodebookMatMulLowRank::kInputs;
  }

  std::string name() const {
    const bool branch = kind == Kind::kLowRank;
    const char* one = branch ? contract::CodebookMatMulLowRank::kName : contract::CodebookMatMul::kName;
    const char* all = branch ? contract::CodebookExpertsLowRank::kName : contract::CodebookExperts::kName;
    const char* base = kind == Kind::kGather ? contract::CodebookGather::kName : experts ? all : one;
    const std::string merging = merged > 0 ? contract::kMerged + std::to_string(merged) : "";
    return base + std::to_string(bits) + (int8_activations ? contract::CodebookMatMulA8::kSuffix : "") + merging;
  }
};

// Answers ONNX Runtime's questions about a signature; `Op` adds CreateKernelV2.
// Name and memory type stay as ONNX Runtime's template has them; inputs of every provider are in that provider's
// memory.
template <class Op, class Kernel>
struct SignedOp : Ort::CustomOpBase<Op, Kernel, true> {
  const Signature signature;
  const std::string name;  // ONNX Runtime keeps the pointer

  explicit SignedOp(const Signature& signature_) : signature(signature_), name(signature_.name()) {}

  const char* GetName() const { return name.c_str(); }
  // The constants are one input of any number and types, checked when a node is created: ONNX Runtime keeps the names of
  // all types for every input that is declared, 6 MB for the operators of this library.
  size_t GetInputTypeCount() const { return 2; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t input) const {
    return input == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  }
  bool GetVariadicInputHomogeneity() const { return false; }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    if (input > 0) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    return signature.kind == Kind::kGather ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : signature.type;
  }
  size_t GetOutputTypeCount() const { return static_cast<size_t>(signature.products()); }
  ONNXTensorElementDataType GetOutputType(size_t) const { return signature.type; }
};

inline constexpr ONNXTensorElementDataType kFloatTypes[] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

// Calls add(signature) for every product of experts.
template <class Add>
void each_experts_signature(Add&& add) {
  for (const int bits : contract::kBits) {
    for (const auto type : kFloatTypes) {
      for (const bool int8_activations : {false, true}) {
        for (const Kind kind : {Kind::kMatMul, Kind::kLowRank}) add(Signature{kind, bits, type, int8_activations, 0, true});
      }
    }
  }
}

// Calls add(signature) for every other operator that there is.
// Look-ups have one type: their output is fp32, whatever the products take.
template <class Add>
void each_signature(Add&& add) {
  for (const int bits : contract::kBits) {
    for (const auto type : kFloatTypes) {
      for (int merged = 0; merged <= contract::kMostMerged; ++merged) {
        for (const bool int8_activations : {false, true}) {
          for (const Kind kind : {Kind::kMatMul, Kind::kLowRank}) add(Signature{kind, bits, type, int8_activations, merged});
        }
      }
    }
    add(Signature{Kind::kGather, bits, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false, 0});
  }
}

}  // namespace rankbook::ort
