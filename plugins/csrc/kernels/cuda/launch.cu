// Checks of the arguments, and the order in which the kernels of one product run.
#include "kernels/cuda/launch.h"

#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/integer_launch.cuh"

namespace rankbook::cuda {
namespace {

constexpr std::size_t kAlign = 256;

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool misaligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0; }

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

// How many blocks may share a panel; a bound that depends on the layer only, for the workspace.
int most_shares(int panels) {
  const int shares = 768 / panels;
  return shares < 1 ? 1 : (shares < 8 ? shares : 8);
}

// Workspace of the shared sums of a product of `tokens` tokens, and before them the counters.
std::size_t share_bytes(int panels, DataType type, int tokens) {
  const int tile = tokens <= (type == DataType::kFloat32 ? 4 : 8) ? 8 : 16;  // at least the tokens of a kernel
  return aligned(sizeof(unsigned) * panels) +
         aligned(sizeof(float) * static_cast<std::size_t>(most_shares(panels)) * panels * tile * kPanel);
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

// Whether codes are decoded inside the product. Otherwise into scratch: many tokens in fp32 or with more than two planes,
// rows that are not made of pieces of 16 bytes, groups that end inside a unit (of 32 inputs with 3 bits).
bool decodes_directly(const Matmul& m) {
  const PackedWeight& w = m.weight;
  const bool whole_units = w.bits != 3 || w.groups == 1 || w.columns / w.groups % 32 == 0;
  if (m.type == DataType::kFloat32) return m.tokens <= most_float_tokens(w.bits, w.planes());
  return w.columns % 8 == 0 && whole_units && (m.tokens <= kMaxDecodeTokens || w.planes() <= 2);
}

// Blocks that share a panel, so that a layer of few rows fills the GPU: three blocks of `work` pieces for the warps of
// every multiprocessor. At most `most_shares`.
int count_shares(const Matmul& m, int work) {
  const int panels = ceil_div(m.weight.rows, kPanel);
  const int wanted = 3 * multiprocessors() / panels, useful = work / kWarps;
  const int most = most_shares(panels);
  const int shares = wanted < useful ? wanted : useful;
  return shares < 1 ? 1 : (shares < most ? shares : most);
}

// Places in the workspace of an integer product; returns the bytes that they take. `at` may be null.
std::size_t lay_out(const Matmul& m, const IntegerPlan& plan, char* at, IntegerKernel* k) {
  std::size_t used = 0;
  const auto take = [&](std::size_t bytes) {
    char* place = at == nullptr ? nullptr : at + used;
    used += aligned(bytes);
    return place;
  };
  const std::size_t tokens = static_cast<std::size_t>(m.tokens);
  k->ordered = reinterpret_cast<std::int8_t*>(take(tokens * plan.padded + kZeroBytes));
  k->natural = reinterpret_cast<std::int8_t*>(take(m.rank > 0 ? tokens * m.weight.columns : 0));
  k->rounded = reinterpret_cast<Rounded*>(take(sizeof(Rounded) * plan.pieces() * plan.slots));
  k->levels = reinterpret_cast<LevelBytes*>(take(sizeof(LevelBytes)));
  return used;
}

template <typename T>
Status round_tokens(const IntegerKernel& k, bool in_place, void* stream) {
  const int blocks = ceil_div(k.k.m.weight.groups, kWarps);
  if (in_place) return launch(round_in_place<T>, dim3(blocks, k.k.m.tokens), 0, stream, k);
  return launch(round_activations<T>, dim3(blocks + 1, k.k.m.tokens), 0, stream, k);
}

Status round_any(const IntegerKernel& k, bool in_place, void* stream) {
  if (k.k.m.type == DataType::kFloat32) return round_tokens<Float>(k, in_place, stream);
  return k.k.m.type == DataType::kFloat16 ? round_tokens<Half>(k, in_place, stream)
                                          : round_tokens<BFloat>(k, in_place, stream);
}

// Takes what blocks that share a panel need from the workspace, and clears it.
Status prepare_shares(MatmulKernel& k, int shares, char* at, void* stream) {
  if (shares < 2) return {};
  const int panels = ceil_div(k.m.weight.rows, kPanel);
  k.arrivals = reinterpret_cast<unsigned*>(at);
  k.shares = reinterpret_cast<float*>(at + aligned(sizeof(unsigned) * panels));
  return clear(k.arrivals, sizeof(unsigned) * panels, stream);
}

std::size_t u_bytes(const Matmul& m) { return aligned(sizeof(float) * static_cast<std::size_t>(m.rank) * m.tokens); }

// The product of rounded activations by integer tensor cores.
Status integer_product(const Matmul& m, const IntegerPlan& plan, void* stream) {
  IntegerKernel k{{m, static_cast<float*>(m.workspace), nullptr}, plan};
  char* at = static_cast<char*>(m.workspace) + u_bytes(m);
  at += lay_out(m, plan, at, &k);
  if (const Status status = round_any(k, false, stream); !status.ok()) return status;
  if (m.rank > 0) {
    const dim3 grid(ceil_div(m.rank, kWarps), m.tokens);
    if (const Status status = launch(branch_down_int8<>, grid, 0, stream, k); !status.ok()) return status;
  }
  const int shares = count_shares(m, plan.turns);
  if (const Status status = prepare_shares(k.k, shares, at, stream); !status.ok()) return status;
  switch (m.weight.bits) {
    case 2: return Int8Entry<2>::decode(k, shares, stream);
    case 3: return Int8Entry<3>::decode(k, shares, stream);
    case 4: return Int8Entry<4>::decode(k, shares, stream);
    default: return Int8Entry<8>::decode(k, shares, stream);
  }
}

std::size_t rounded_bytes(const Matmul& m) {
  return aligned(element_size(m.type) * static_cast<std::size_t>(m.tokens) * m.weight.columns);
}

// Rounded activations as floats, and then the product of those: for what has no integer form, and many tokens.
Status rounded_product(Matmul m, void* stream) {
  IntegerKernel k{{m, nullptr, nullptr}, {}};
  k.ordered = static_cast<std::int8_t*>(m.workspace);
  if (const Status status = round_any(k, true, stream); !status.ok()) return status;
  m.x = m.workspace;
  m.workspace = static_cast<char*>(m.workspace) + rounded_bytes(m);
  m.int8_activations = false;
  return launch_matmul(m, stream);
}

}  // namespace

std::size_t matmul_workspace(const Matmul& m) {
  const int few = m.tokens < kMaxDecodeTokens ? m.tokens : kMaxDecodeTokens, panels = ceil_div(m.weight.rows, kPanel);
  if (m.int8_activations) {
    Matmul other = m;
    other.int8_activations = false;
    std::size_t most = rounded_bytes(m) + matmul_workspace(other);
    for (const int tokens : {1, 8, kIntegerTokens}) {  // each may have an integer product where the others have none
      other.tokens = tokens < few ? tokens : few;
      const IntegerPlan plan = integer_plan(m.weight, other.tokens);
      if (plan.parts == 0) continue;
      IntegerKernel unused;
      const std::size_t bytes =
          u_bytes(other) + lay_out(other, plan, nullptr, &unused) + share_bytes(panels, DataType::kFloat16, other.tokens);
      most = bytes > most ? bytes : most;
    }
    return most;
  }
  // A builder asks for the largest number of tokens only; fewer must find room as well.
  const std::size_t shares = most_shares(panels) > 1 ? share_bytes(panels, m.type, few) : 0;
  if (decodes_directly(m)) return u_bytes(m) + shares;
  const std::size_t dense = aligned(element_size(m.type) * static_cast<std::size_t>(m.weight.rows) * m.weight.columns);
  return u_bytes(m) + (shares > dense ? shares : dense);
}

Status launch_matmul(const Matmul& m, void* stream) {
  if (const Status status = check(m.weight); !status.ok()) return status;
  if (m.tokens < 0 || m.rank < 0) return {"the number of tokens and the rank must not be negative"};
  if (m.tokens == 0) return {};
  if (misaligned(m.x, 16) || misaligned(m.y, 16)) return {"x and y must be aligned to 16 bytes"};
  if (m.workspace == nullptr && matmul_workspace(m) > 0) {
    return {"the product needs a workspace of matmul_workspace() bytes"};
  }
  if (m.int8_activations) {
    const IntegerPlan plan = integer_plan(m.weight, m.tokens);
    return plan.parts > 0 ? integer_product(m, plan, stream) : rounded_product(m, stream);
  }
  MatmulKernel k{m, static_cast<float*>(m.workspace), nullptr};
  if (m.rank > 0) {
    if (const Status status = any_down(k, stream); !status.ok()) return status;
  }
  char* rest = static_cast<char*>(m.workspace) + u_bytes(m);
  if (decodes_directly(m) && m.tokens > kMaxDecodeTokens) {
    return by_width(m.weight.bits, [](auto width, const auto&... all) { return width.prefill(all...); }, k, stream);
  }
  if (decodes_directly(m)) {
    const int shares = count_shares(m, ceil_div(m.weight.columns, m.weight.bits == 3 ? 128 : 64));
    if (const Status status = prepare_shares(k, shares, rest, stream); !status.ok()) return status;
    return by_width(m.weight.bits, [](auto width, const auto&... all) { return width.decode(all...); }, k, shares, stream);
  }
  k.dense = rest;
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
