#pragma once

#include <cstring>

namespace rankbook {

// What a function of the kernels answers, on the CPU and on CUDA: ok, or a sentence that says what is wrong. Kernels never
// throw, print or allocate, so sentences are static strings; the shim of each runtime puts the node before them.
struct Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

// By their text: the compiler may give one sentence an address in each translation unit.
inline bool operator==(Status a, Status b) {
  if (a.ok() || b.ok()) return a.ok() == b.ok();
  return std::strcmp(a.message, b.message) == 0;
}

// What both devices find wrong with a weight, and what shims can say more about than kernels know.
namespace refusal {

inline constexpr Status kBits = {"codes must have 2, 3, 4 or 8 bits"};
inline constexpr Status kEmpty = {"the weight has no rows, columns or planes"};
inline constexpr Status kDivision = {"the number of groups must divide the number of columns"};
inline constexpr Status kGroups = {"groups must be multiples of 16 columns, or one group must be the whole row"};
inline constexpr Status kUnlike = {"products of one x must have the same width, inputs and groups, of at most 65536 inputs"};
inline constexpr Status kIndex = {"an index lies outside of the rows"};
inline constexpr Status kPosition = {"a position lies outside of the rows of cos"};
inline constexpr Status kHead = {"the elements of a head must be a multiple of 8 up to 512"};
inline constexpr Status kLengths = {"the lengths of the cache do not fit each other"};

}  // namespace refusal
}  // namespace rankbook
