#include "check_rows.h"

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

// Numbers of both signs, among them large ones, drawn by a fixed rule.
std::vector<float> numbers(int64_t count, float size) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = 12345;
  for (float& value : out) {
    state = state * 1664525U + 1013904223U;
    value = size * (static_cast<float>(state >> 8) / 8388608.0F - 1.0F);
  }
  return out;
}

}  // namespace

int check_rows(const rankbook::RowKernels& kernels) {
  int failures = 0;
  for (const int64_t size : {1, 7, 16, 63, 64, 65, 576}) {
    const std::vector<float> a = numbers(size, 3.0F), b = numbers(size + 1, 2.0F), scale = numbers(size + 2, 1.0F);
    std::vector<float> y(a.size()), sum(a.size()), gate(a.size());
    kernels.add_norm(a.data(), b.data(), scale.data(), size, 1e-5F, y.data(), sum.data());
    const std::vector<float> wide = numbers(size, 100.0F);
    kernels.swiglu(wide.data(), a.data(), size, gate.data());
    double squares = 0.0;
    for (size_t i = 0; i < a.size(); ++i) squares += std::pow(static_cast<double>(a[i]) + b[i], 2);
    const double factor = 1.0 / std::sqrt(squares / static_cast<double>(size) + 1e-5);
    double worst = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
      const double both = static_cast<double>(a[i]) + b[i];
      worst = std::fmax(worst, std::fabs(y[i] - both * factor * scale[i]));
      worst = std::fmax(worst, std::fabs(sum[i] - both));
      const double gated = wide[i] / (1.0 + std::exp(-static_cast<double>(wide[i]))) * a[i];
      worst = std::fmax(worst, std::fabs(gate[i] - gated) / (std::fabs(gated) + 1e-6));
    }
    if (worst < 2e-6) continue;  // values of up to 5 with roundings of 2^-24 of them, in one sum of up to 576 squares
    std::fprintf(stderr, "%s: rows of %ld numbers: error %g\n", kernels.name, static_cast<long>(size), worst);
    ++failures;
  }
  return failures;
}
