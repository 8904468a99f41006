// Checks of the arguments, and the workspace.
//
// matmul_workspace, launch_matmul, launch_gather and launch_dense (launch.h), which the shims of TensorRT and of ONNX
// Runtime call. No state, no allocation, nothing that waits: calls may be captured into a CUDA graph once every shape
// has run.
#include "kernels/cuda/products.cuh"

namespace rankbook::cuda {
namespace {
// The limits of the device code, wider than those of files, which contract.h holds and the shims check with sentences
// that name the node: groups of up to 256 inputs there, as on CPUs. 2^20 columns and groups of 2^12 keep the division
// by multiplication in `Steps::group` exact.
Status check(const PackedWeight& w) {
  if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8) return refusal::kBits;
  if (w.rows < 1 || w.columns < 1) return refusal::kEmpty;
  if (w.planes() < 1 || w.planes() > kMaxPlanes) return {"the weight must have 1 to 4 planes of coefficients"};
  if (w.columns > 1 << 20) return {"the weight must not have more than 2^20 columns"};
  if (w.groups < 1 || w.columns % w.groups != 0) return refusal::kDivision;
  if (w.groups > 1 && w.columns / w.groups % 16 != 0) return refusal::kGroups;
  if (w.groups > 1 && w.columns / w.groups > 4096) {
    return {"groups must have at most 4096 columns, or one group must be the whole row"};
  }
  if (w.step.type == DataType::kBFloat16) return {"steps must be float32 or float16"};
  if (misaligned(w.codes, 16) || misaligned(w.params, 4)) return {"codes must be aligned to 16 bytes, params to 4"};
  return {};
}

// Four codes of a factor are one word. A misaligned load on a GPU ends the context of the whole process, so pointers are
// checked here, not there.
Status check_factor(const Factor& factor, const char* sentence) {
  const std::size_t element = factor.scale.type == DataType::kFloat32 ? 4 : 2;
  return misaligned(factor.codes, 4) || misaligned(factor.scale.data, element) ? Status{sentence} : Status{};
}

// Workspace of the sums of blocks that share a panel of a product of up to 16 tokens, and before them the counters.
// A bound for every GPU: TensorRT asks for it when an engine is built, on another machine perhaps.
std::size_t share_bytes(int rows, DataType type, int tokens) {
  const int panels = ceil_div(rows, kPanel);
  const int tile = tokens <= (type == DataType::kFloat32 ? 4 : 8) ? 8 : 16;  // at least the tokens of a kernel
  if (most_shares(rows) < 2) return 0;
  return aligned(sizeof(unsigned) * panels) +
         aligned(sizeof(float) * static_cast<std::size_t>(most_shares(rows)) * panels * tile * kPanel);
}

// The same for `tokens` tokens, or 17 to `tokens` of them: fewer tokens have more shares, so each number of tiles is tried.
std::size_t tile_share_bytes(const Matmul& m, int tokens) {
  std::size_t most = 0;
  for (int tiles = 1; tiles <= ceil_div(tokens, 64); ++tiles) {
    const int shares = most_tile_shares(m, 64 * tiles);
    if (shares < 2) break;
    const std::size_t rows = static_cast<std::size_t>(ceil_div(m.weight.rows, kPanel)) * kPanel;
    const std::size_t bytes = aligned(sizeof(float) * shares * 64 * tiles * rows);
    most = bytes > most ? bytes : most;
  }
  return most;
}

Status check_product(const Matmul& m) {
  if (const Status status = check(m.weight); !status.ok()) return status;
  if (m.tokens < 0 || m.rank < 0) return {"the number of tokens and the rank must not be negative"};
  if (m.tokens == 0) return {};
  if (misaligned(m.x, 16) || misaligned(m.y, 16)) return {"x and y must be aligned to 16 bytes"};
  if (misaligned(m.bias, 4)) return {"bias must be aligned to 4 bytes"};
  if (m.experts < 0 || m.experts > kMostExperts) return {"a stack must hold 1 to 4096 experts"};
  if (misaligned(m.numbers, 8) || (m.experts > 0 && m.numbers == nullptr)) {
    return {"the product of experts needs the number of the expert of each token, aligned to 8 bytes"};
  }
  if (m.rank == 0) return {};
  if (const Status s = check_factor(m.down, "down must be aligned to 4 bytes, its scale to one element"); !s.ok()) return s;
  return check_factor(m.up, "up must be aligned to 4 bytes, its scale to one element");
}

Status check_products(const Matmul* all, int count) {
  if (count < 1 || count > kMostProducts) return {"there must be 1 to 4 products of one x"};
  for (int i = 0; i < count; ++i) {
    const Matmul &m = all[i], &first = all[0];
    if (const Status status = check_product(m); !status.ok()) return status;
    if (m.x != first.x || m.type != first.type || m.tokens != first.tokens || m.int8_activations != first.int8_activations ||
        m.weight.columns != first.weight.columns || (count > 1 && m.experts > 0)) {
      return {"products of one call must have x, its type and what is done to it in common, and no experts"};
    }
  }
  return {};
}

}  // namespace

// Nothing here asks a device, for the reason that share_bytes has.
std::size_t matmul_workspace(const Matmul& all) {
  Matmul m = all;
  m.tokens = m.tokens < most_tokens(m) ? m.tokens : most_tokens(m);
  if (m.experts > 0) {
    ExpertKernel unused;
    return (m.int8_activations ? rounded_bytes(m) : 0) + u_bytes(m) + lay_out(m, nullptr, &unused);
  }
  const int few = m.tokens < kMaxDecodeTokens ? m.tokens : kMaxDecodeTokens;
  if (m.int8_activations) {
    Matmul other = m;
    other.int8_activations = false;
    std::size_t most = rounded_bytes(m) + matmul_workspace(other);
    for (const int tokens : {1, 8, kInt8Tokens}) {  // each may have an int8 product where the others have none
      other.tokens = tokens < few ? tokens : few;
      const Int8Plan plan = int8_plan(m.weight, other.tokens);
      if (plan.parts == 0) continue;
      Int8Kernel unused;
      const std::size_t bytes = u_bytes(other) + lay_out(other, plan, nullptr, &unused) +
                                share_bytes(m.weight.rows, DataType::kFloat16, other.tokens);
      most = bytes > most ? bytes : most;
    }
    return most;
  }
  // A builder asks for the largest number of tokens only; fewer must find room as well.
  std::size_t most = share_bytes(m.weight.rows, m.type, few);
  const std::size_t dense = aligned(element_size(m.type) * static_cast<std::size_t>(dense_rows(m)) * m.weight.columns);
  const std::size_t more = !decodes_directly(m) ? dense : m.tokens > few ? tile_share_bytes(m, m.tokens) : 0;
  most = more > most ? more : most;
  return u_bytes(m) + most;
}

std::size_t matmuls_workspace(const Matmul* products, int count) {
  std::size_t most = 0, together = 0;
  for (int i = 0; i < count; ++i) {
    const std::size_t alone = matmul_workspace(products[i]);
    most = alone > most ? alone : most;
    Matmul few = products[i];
    few.tokens = few.tokens < kMaxDecodeTokens ? few.tokens : kMaxDecodeTokens;
    together += aligned(matmul_workspace(few));
  }
  // Beside products that are rounded in place stands what they are rounded to.
  if (count > 1 && products[0].int8_activations) together += rounded_bytes(products[0]);
  return count > 1 && together > most ? together : most;
}

Status launch_matmul(const Matmul& m, void* stream) { return launch_matmuls(&m, 1, stream); }

Status launch_matmuls(const Matmul* products, int count, void* stream) {
  if (const Status status = check_products(products, count); !status.ok()) return status;
  const Matmul& m = products[0];
  if (m.tokens == 0) return {};
  if (m.workspace == nullptr && matmuls_workspace(products, count) > 0) {
    return {"the product needs a workspace of matmul_workspace() bytes"};
  }
  if (misaligned(m.workspace, 16)) return {"the workspace must be aligned to 16 bytes"};
  // Tokens are y of most grids. More than fit there are multiplied in slices, each of whole tiles and rows of 16 bytes.
  for (int first = 0; first < m.tokens; first += most_tokens(m)) {
    Matmul slices[kMostProducts];
    for (int i = 0; i < count; ++i) {
      Matmul& slice = slices[i] = products[i];
      slice.tokens = m.tokens - first < most_tokens(m) ? m.tokens - first : most_tokens(m);
      // Slices follow each other in the stream and use one workspace.
      const std::size_t before = element_size(m.type) * static_cast<std::size_t>(first);
      slice.x = static_cast<const char*>(m.x) + before * m.weight.columns;
      slice.y = static_cast<char*>(slice.y) + before * slice.weight.rows;
      if (m.experts > 0) slice.numbers = m.numbers + first;
    }
    if (const Status status = multiply(slices, count, stream); !status.ok()) return status;
  }
  return {};
}

Status launch_gather(const Gather& g, void* stream) {
  if (const Status status = check(g.weight); !status.ok()) return status;
  if (g.count <= 0) return {};
  if (misaligned(g.y, 16)) return {"y must be aligned to 16 bytes"};
  return by_width(g.weight.bits, [](auto width, const auto&... rest) { return width.gather(rest...); }, g, stream);
}

// For runtimes that want the weight itself; products use parts of it.
Status launch_dense(const PackedWeight& w, void* y, DataType type, void* stream) {
  if (const Status status = check(w); !status.ok()) return status;
  if (misaligned(y, 16)) return {"y must be aligned to 16 bytes"};
  const DenseKernel k{w, y, 0, w.rows};
  return by_width(w.bits, [](auto width, const auto&... rest) { return width.dense(rest...); }, k, type, stream);
}

}  // namespace rankbook::cuda
