// The operators as TensorRT sees them: the C++ side of plugins/contract.py. No CUDA in here.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "shims/view.h"

namespace rankbook::trt {

enum class Kind : std::int32_t { kMatmul, kMatmulLowRank, kGather };

inline constexpr const char* kLayerField = "layer";  // the layer's name, stored in engines for messages
inline constexpr std::int32_t kMaxInputs = contract::CodebookExpertsLowRank::kInputCount;

// What an operator is and what its attributes say.
struct Operator {
  Kind kind = Kind::kMatmul;
  bool int8 = false;  // of a product: activations are rounded to 8 bits
  bool experts = false;  // of a product: constants are stacks, behind the numbers of the experts
  std::int32_t bits = 0;
  std::int32_t in_features = 0;
  std::int32_t out_features = 0;
  std::int32_t offset = 0;

  std::string name() const;
  std::int32_t inputs() const;
  std::int32_t output_features() const { return kind == Kind::kGather ? in_features : out_features; }

  // Where an input of an operator of one layer is: the numbers of the experts come between x and the constants.
  std::int32_t position(std::int32_t port) const { return port + (experts && port > Port::kX ? 1 : 0); }

  // The layer that types and shapes of all inputs describe, and how many of the kind are stacked (0: no stack). Returns what
  // is wrong, or nothing.
  std::string read(const Constant* inputs_given, Layer* layer, std::int64_t* stacked) const;

  // Whether `type` is allowed for input `at`, or for the output at inputs(); x_type is the type of input 0.
  bool allows(std::int32_t at, nvinfer1::DataType type, nvinfer1::DataType x_type) const;
};

Constant constant_of(nvinfer1::DataType type, const nvinfer1::Dims& dims);

// Product of the leading dimensions of x, or of all dimensions of indices; -1 if one is unknown.
std::int64_t count_items(const Operator& op, const nvinfer1::Dims& dims);

}  // namespace rankbook::trt
