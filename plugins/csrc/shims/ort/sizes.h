#pragma once

// The shape of an input of a call. Without heap memory, which would cost as much as the rest of a small node's overhead.

#include <array>
#include <string>
#include <vector>

#include "shims/ort/constants.h"

namespace rankbook::ort {

struct Sizes {
  static constexpr size_t kMostAxes = 8;

  size_t axes = 0;
  std::array<int64_t, kMostAxes> at{};  // 0 behind the last axis, and everywhere if there are more axes than that

  Sizes() = default;
  Sizes(std::initializer_list<int64_t> sizes) : axes(sizes.size()) {
    size_t axis = 0;
    for (const int64_t size : sizes) at[axis++] = size;
  }
  explicit Sizes(const Ort::TensorTypeAndShapeInfo& info) : axes(info.GetDimensionsCount()) {
    if (axes <= kMostAxes) Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, at.data(), axes));
  }
  explicit Sizes(const Ort::ConstValue& value) : Sizes(value.GetTensorTypeAndShapeInfo()) {}

  bool operator==(const Sizes& other) const { return axes == other.axes && at == other.at; }
  bool has(size_t least) const { return axes >= least && axes <= kMostAxes; }
  int64_t& last() { return at[axes - 1]; }
  int64_t last() const { return at[axes - 1]; }
  int64_t count(size_t first_axes) const {
    int64_t out = 1;
    for (size_t i = 0; i < first_axes; ++i) out *= at[i];
    return out;
  }
  int64_t count() const { return count(axes); }
  std::string text() const {
    if (axes > kMostAxes) return "of " + std::to_string(axes) + " axes";
    return describe(std::vector<int64_t>(at.begin(), at.begin() + static_cast<std::ptrdiff_t>(axes)));
  }
};

}  // namespace rankbook::ort
