#pragma once

// Generated from plugins/contract.py: `python -m rankbook.tools.contract_header`. A test finds a stale one.

namespace rankbook::contract {

inline constexpr const char* kDomain = "rankbook";
inline constexpr const char* kPluginNamespace = "rankbook";
inline constexpr const char* kPluginVersion = "1";
inline constexpr int kBits[] = {2, 3, 4, 8};
inline constexpr const char* kMerged = "Merged";
inline constexpr int kMostMerged = 3;
inline constexpr const char* kMergedParts[] = {"down", "params", "up", "codes"};
inline constexpr const char* kInFeatures = "in_features";
inline constexpr const char* kOutFeatures = "out_features";
inline constexpr const char* kOffset = "offset";

struct CodebookMatMul {  // CodebookMatMul<bits>
  static constexpr const char* kName = "CodebookMatMul";
  static constexpr const char* kSuffix = "";
  enum Input { kX, kCodes, kLevels, kParams, kStep, kBase, kBias, kInputCount };
  static constexpr const char* kInputs[] = {"x", "codes", "levels", "params", "step", "base", "bias"};
};

struct CodebookMatMulLowRank {  // CodebookMatMulLowRank<bits>
  static constexpr const char* kName = "CodebookMatMulLowRank";
  static constexpr const char* kSuffix = "";
  enum Input { kX, kCodes, kLevels, kParams, kStep, kBase, kBias, kDown, kDownScale, kUp, kUpScale, kInputCount };
  static constexpr const char* kInputs[] = {"x", "codes", "levels", "params", "step", "base", "bias", "down", "down_scale", "up", "up_scale"};
};

struct CodebookGather {  // CodebookGather<bits>
  static constexpr const char* kName = "CodebookGather";
  static constexpr const char* kSuffix = "";
  enum Input { kIndices, kCodes, kLevels, kParams, kStep, kBase, kInputCount };
  static constexpr const char* kInputs[] = {"indices", "codes", "levels", "params", "step", "base"};
};

struct CodebookMatMulA8 {  // CodebookMatMul<bits>A8
  static constexpr const char* kName = "CodebookMatMul";
  static constexpr const char* kSuffix = "A8";
  enum Input { kX, kCodes, kLevels, kParams, kStep, kBase, kBias, kInputCount };
  static constexpr const char* kInputs[] = {"x", "codes", "levels", "params", "step", "base", "bias"};
};

struct CodebookMatMulLowRankA8 {  // CodebookMatMulLowRank<bits>A8
  static constexpr const char* kName = "CodebookMatMulLowRank";
  static constexpr const char* kSuffix = "A8";
  enum Input { kX, kCodes, kLevels, kParams, kStep, kBase, kBias, kDown, kDownScale, kUp, kUpScale, kInputCount };
  static constexpr const char* kInputs[] = {"x", "codes", "levels", "params", "step", "base", "bias", "down", "down_scale", "up", "up_scale"};
};

struct Attention {
  static constexpr const char* kName = "GroupQueryAttention";
  static constexpr int kLargestHead = 512;
  static constexpr int kHeadStep = 8;
  static constexpr int kRotaryStep = 16;
  enum Input { kQuery, kKey, kValue, kPastKey, kPastValue, kSeqlensK, kTotalSequenceLength, kCos, kSin, kPositionIds, kInputCount };
  enum Output { kOutput, kPresentKey, kPresentValue, kOutputCount };
  static constexpr const char* kInputs[] = {"query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos", "sin", "position_ids"};
  static constexpr const char* kNumHeads = "num_heads";
  static constexpr const char* kKvNumHeads = "kv_num_heads";
  static constexpr const char* kLocalWindowSize = "local_window_size";
  static constexpr const char* kDoRotary = "do_rotary";
  static constexpr const char* kScale = "scale";
  static constexpr const char* kSoftcap = "softcap";
};

struct AddRMSNormalization {
  static constexpr const char* kName = "AddRMSNormalization";
  enum Input { kA, kB, kScale, kInputCount };
  enum Output { kOutY, kOutSum, kOutputCount };
  static constexpr const char* kInputs[] = {"a", "b", "scale"};
  static constexpr const char* kEpsilon = "epsilon";
};

struct SwiGLU {
  static constexpr const char* kName = "SwiGLU";
  enum Input { kGate, kUp, kInputCount };
  enum Output { kOutY, kOutputCount };
  static constexpr const char* kInputs[] = {"gate", "up"};
};

}  // namespace rankbook::contract
