#pragma once

// A packed layer as its constants describe it: the one place where shapes and types are read and checked, for every
// runtime. What is allowed is the table of contract.h; what is wrong is a sentence.

#include <array>
#include <string>

#include "contract.h"
#include "shims/shape.h"

namespace rankbook {

using Port = contract::CodebookMatMulLowRank;  // inputs of the largest operator; the others have the first of them

// What a runtime says about a constant.
struct Constant {
  contract::Type type = contract::Type::kOther;
  Shape shape;
};

struct LayerAttributes {
  int bits = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  int64_t offset = 0;
};

struct Layer {
  int bits = 0;
  bool has_offset = false;
  int64_t rows = 0;          // N
  int64_t columns = 0;       // K
  int64_t groups = 0;        // G
  int64_t param_planes = 0;  // Q
  int64_t rank = 0;          // R; 0 for no error branch
  size_t inputs = 0;         // of its operator
  std::array<int, contract::kPartCount> forms{};  // which form each part has

  int64_t planes() const { return param_planes - (has_offset ? 1 : 0); }
  const contract::Form& form(contract::PartIndex part) const {
    return contract::kParts[part].forms[forms[static_cast<size_t>(part)]];
  }
  int param_bits() const { return form(contract::kParamsPart).bits; }     // 8: params * step + base; else step alone
  int factor_bits() const { return form(contract::kFactorsPart).bits; }   // 8: down * down_scale; else down_scale alone
  bool has_part(int part) const {
    return contract::kParts[part].forms[0].constants[0].input < static_cast<int>(inputs);
  }
  bool has_bias() const { return has_part(contract::kBiasPart) && forms[contract::kBiasPart] == 0; }

  // Calls work(stored) for every constant.
  template <class Work>
  void each(Work&& work) const {
    for (int part = 0; part < contract::kPartCount; ++part) {
      if (!has_part(part)) continue;
      const contract::Form& held = form(static_cast<contract::PartIndex>(part));
      for (int i = 0; i < held.count; ++i) work(held.constants[i]);
    }
  }
};

// What is wrong with them, or nothing; `suffix` stands behind their names.
std::string check_attributes(const LayerAttributes& attributes, const std::string& suffix);

// What the kernels of a device take beside the table. No more planes of levels than 2^bits.
struct Limits {
  int64_t planes, columns;
  bool casts;  // whether the runtime may have cast fp16 constants to fp32
};
inline constexpr Limits kCpuLimits = {256, contract::kLargestSize, true};
inline constexpr Limits kCudaLimits = {contract::kCudaPlanes, contract::kCudaColumns, false};

// Takes the first axis, that of the experts, from the shapes of the constants; returns what is wrong, or nothing.
std::string unstack(Constant* constants, size_t inputs, int64_t* experts);

// Returns what is wrong, or nothing. `constants` are the `inputs` of the operator by position, of which the first is not
// looked at; `suffix` stands behind their names.
std::string read_layer(const LayerAttributes& attributes, const Constant* constants, size_t inputs, const Limits& limits,
                       const std::string& suffix, Layer* out);

// What is wrong with the elements of one constant, or nothing: NaN, infinity, a placeholder that holds something else.
std::string check_elements(const contract::Stored& stored, contract::Type type, const void* elements, int64_t count,
                           const std::string& suffix);

}  // namespace rankbook
