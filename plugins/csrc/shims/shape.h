#pragma once

// Sizes of a tensor, without heap memory: for an input of a call it would cost as much as the rest of a small node's
// overhead.

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace rankbook {

struct Shape {
  // TensorRT's own limit; ONNX Runtime has none, and no activation has more axes.
  static constexpr size_t kMostAxes = 8;

  size_t axes = 0;
  std::array<int64_t, kMostAxes> at{};  // 0 behind the last axis, and everywhere if there are more axes than that

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) : axes(sizes.size()) {
    size_t axis = 0;
    for (const int64_t size : sizes) at[axis++] = size;
  }

  bool operator==(const Shape& other) const { return axes == other.axes && at == other.at; }
  // False as well where there are more axes than `at` has room for, so that whoever asks may use them.
  bool has(size_t least) const { return axes >= least && axes <= kMostAxes; }
  int64_t& last() { return at[axes - 1]; }
  int64_t last() const { return at[axes - 1]; }
  // The number of tokens is the count of all axes but the last.
  int64_t count(size_t first_axes) const {
    int64_t out = 1;
    for (size_t i = 0; i < first_axes; ++i) out *= at[i];
    return out;
  }
  int64_t count() const { return count(axes); }
  // As Python writes a tuple, because the sentences stand beside those of numpy and onnx.
  std::string text() const {
    if (axes > kMostAxes) return "of " + std::to_string(axes) + " axes";
    std::string out = "(";
    for (size_t i = 0; i < axes; ++i) out += (i == 0 ? "" : ", ") + std::to_string(at[i]);
    return out + ")";
  }
};

}  // namespace rankbook
