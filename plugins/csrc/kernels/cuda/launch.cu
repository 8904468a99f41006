// Checks of the arguments, and the order in which the kernels of one product run.
#include "kernels/cuda/launch.h"

#include "kernels/cuda/dispatch.cuh"

namespace rankbook::cuda {
namespace {

constexpr std::size_t kAlign = 256;

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool misaligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0; }

Status check(const PackedWeight& w) {
  if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8) return {"codes must have 2, 3, 4 or 8 bits"};
  if (w.rows < 1 || w.columns < 1) return {"the weight has no rows or no columns"};
  if (w.planes() < 1 || w.planes() > kMaxPlanes) return {"the weight must have 1 to 4 planes of coefficients"};
  if (w.groups < 1 || w.columns % w.groups != 0) return {"the number of groups must divide the number of columns"};
  if (w.groups > 1 && w.columns / w.groups % 16 != 0) {
    return {"groups must be multiples of 16 columns, or one group must be the whole row"};
  }
  if (w.step.type == DataType::kBFloat16) return {"steps must be float32 or float16"};
  if (misaligned(w.codes, 16) || misaligned(w.params, 4)) return {"codes must be aligned to 16 bytes, params to 4"};
  return {};
}

template <typename Entry, typename... Arguments>
Status by_width(int bits, Entry entry, const Arguments&... arguments) {
  switch (bits) {
    case 2: return entry(WidthEntry<2>{}, arguments...);
    case 3: return entry(WidthEntry<3>{}, arguments...);
    case 4: return entry(WidthEntry<4>{}, arguments...);
    default: return entry(WidthEntry<8>{}, arguments...);
  }
}

template <typename T>
Status down(const MatmulKernel& k, void* stream) {
  const dim3 grid(ceil_div(k.m.rank, kWarps), ceil_div(k.m.tokens, kBranchTokens));
  return launch(branch_down<T>, grid, 0, stream, k);
}

Status any_down(const MatmulKernel& k, void* stream) {
  if (k.m.type == DataType::kFloat32) return down<Float>(k, stream);
  return k.m.type == DataType::kFloat16 ? down<Half>(k, stream) : down<BFloat>(k, stream);
}

Status product(const MatmulKernel& k, void* stream) {
  const int rows = k.m.weight.rows, tokens = k.m.tokens;
  if (k.m.type == DataType::kFloat32) {
    const dim3 grid(ceil_div(rows, FloatTile::kSide), ceil_div(tokens, FloatTile::kSide));
    return launch(gemm_float<Float>, grid, FloatTile::kBytes, stream, k);
  }
  const dim3 grid(ceil_div(rows, MmaTile::kRows), ceil_div(tokens, MmaTile::kTokens));
  return k.m.type == DataType::kFloat16 ? launch(gemm_mma<Half>, grid, MmaTile::kBytes, stream, k)
                                        : launch(gemm_mma<BFloat>, grid, MmaTile::kBytes, stream, k);
}

}  // namespace

std::size_t matmul_workspace(int rows, int columns, int rank, DataType type, int tokens) {
  const std::size_t u = aligned(sizeof(float) * static_cast<std::size_t>(rank) * tokens);
  if (tokens <= kMaxDecodeTokens) return u;
  return u + aligned(element_size(type) * static_cast<std::size_t>(rows) * columns);
}

Status launch_matmul(const Matmul& m, void* stream) {
  if (const Status status = check(m.weight); !status.ok()) return status;
  if (m.tokens < 0 || m.rank < 0) return {"the number of tokens and the rank must not be negative"};
  if (m.tokens == 0) return {};
  if (misaligned(m.x, 16) || misaligned(m.y, 16)) return {"x and y must be aligned to 16 bytes"};
  if (m.workspace == nullptr && matmul_workspace(m.weight.rows, m.weight.columns, m.rank, m.type, m.tokens) > 0) {
    return {"the product needs a workspace of matmul_workspace() bytes"};
  }
  MatmulKernel k{m, static_cast<float*>(m.workspace), nullptr};
  if (m.rank > 0) {
    if (const Status status = any_down(k, stream); !status.ok()) return status;
  }
  if (m.tokens <= kMaxDecodeTokens) {
    return by_width(m.weight.bits, [](auto width, const auto&... rest) { return width.decode(rest...); }, k, stream);
  }
  k.dense = static_cast<char*>(m.workspace) + aligned(sizeof(float) * static_cast<std::size_t>(m.rank) * m.tokens);
  if (const Status status = launch_dense(m.weight, k.dense, m.type, stream); !status.ok()) return status;
  return product(k, stream);
}

Status launch_gather(const Gather& g, void* stream) {
  if (const Status status = check(g.weight); !status.ok()) return status;
  if (g.count <= 0) return {};
  return by_width(g.weight.bits, [](auto width, const auto&... rest) { return width.gather(rest...); }, g, stream);
}

Status launch_dense(const PackedWeight& w, void* y, DataType type, void* stream) {
  if (const Status status = check(w); !status.ok()) return status;
  const DenseKernel k{w, y};
  return by_width(w.bits, [](auto width, const auto&... rest) { return width.dense(rest...); }, k, type, stream);
}

}  // namespace rankbook::cuda
