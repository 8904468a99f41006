// Checks of the arguments, and the order in which the kernels of one product run.
//
// matmul_workspace, launch_matmul, launch_gather and launch_dense (launch.h), which the shims of TensorRT and of ONNX
// Runtime call. No state, no allocation, nothing that waits: calls may be captured into a CUDA graph once every shape
// has run.
//
// A product is at most these launches: rounding of x (A8), the order of many tokens by expert, u = x down^T, the product,
// the sum of shares. Kernels of one width are behind WidthEntry, Int8Entry and ExpertsEntry, so that this file compiles
// none of them.
#include "kernels/cuda/launch.h"

#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/experts_launch.cuh"
#include "kernels/cuda/int8_launch.cuh"

namespace rankbook::cuda {
namespace {

// What cudaMalloc gives, so that every part of the workspace may be read by vectors and starts a cache line of its own.
constexpr std::size_t kAlign = 256;
constexpr int kMostTokens = kMostBlocksY / 64 * 64;  // of one launch

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool misaligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0; }

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

// Rows of a weight that are decoded into scratch at once: all, or as many tiles of 64 as fit `kMostDense`.
// Parts start at whole tiles of the product, which are whole panels of the weight as well.
int dense_rows(const Matmul& m) {
  const std::size_t row = element_size(m.type) * static_cast<std::size_t>(m.weight.columns);
  const std::size_t most = kMostDense / row / 64 * 64, rows = static_cast<std::size_t>(m.weight.rows);
  return static_cast<int>(rows <= most ? rows : most < 64 ? (rows < 64 ? rows : 64) : most);
}

template <template <int> class Entry = WidthEntry, typename Call, typename... Arguments>
Status by_width(int bits, Call call, const Arguments&... arguments) {
  switch (bits) {
    case 2: return call(Entry<2>{}, arguments...);
    case 3: return call(Entry<3>{}, arguments...);
    case 4: return call(Entry<4>{}, arguments...);
    default: return call(Entry<8>{}, arguments...);
  }
}

template <typename T>
Status down(const MatmulKernel& k, void* stream) {
  const dim3 grid(ceil_div(k.m.rank, kBranchRanks), ceil_div(k.m.tokens, kBranchTokens));
  return launch(branch_down<T>, grid, sizeof(float) * 32 * kWarps, stream, k);
}

// Before the product and in the same stream. A later kernel could start while this one runs (programmatic dependent
// launch, sm_90 on) and wait where it reads u; without a GPU to measure the gain, and the risk, that is left out.
Status any_down(const MatmulKernel& k, void* stream) {
  if (k.m.type == DataType::kFloat32) return down<Float>(k, stream);
  return k.m.type == DataType::kFloat16 ? down<Half>(k, stream) : down<BFloat>(k, stream);
}

// The tiled product of a decoded weight; k.dense_rows of its rows.
Status product(const MatmulKernel& k, void* stream) {
  const int rows = k.dense_rows, tokens = k.m.tokens;
  if (k.m.type == DataType::kFloat32) {
    const dim3 grid(ceil_div(rows, FloatTile::kSide), ceil_div(tokens, FloatTile::kSide));
    return launch(gemm_float<Float>, grid, FloatTile::kBytes, stream, k);
  }
  // Rows in x, tokens in y: blocks that run at the same time share tokens, the larger of the two matrices here.
  const dim3 grid(ceil_div(rows, MmaTile::kRows), ceil_div(tokens, MmaTile::kTokens));
  return k.m.type == DataType::kFloat16 ? launch(gemm_mma<Half>, grid, MmaTile::kBytes, stream, k)
                                        : launch(gemm_mma<BFloat>, grid, MmaTile::kBytes, stream, k);
}

// Whether codes are decoded inside the product. Otherwise into scratch: many tokens in fp32 or with more than two planes,
// and what tensor cores do not take: rows that are not made of pieces of 16 bytes, groups that end inside a unit (of 32
// inputs with 3 bits).
// A 3-bit unit is three words for 32 inputs, and a lane of the tensor-core kernels has one codebook at a time: units
// may not be cut by groups.
bool fits_tensor_cores(const Matmul& m) {
  const PackedWeight& w = m.weight;
  const bool whole_units = w.bits != 3 || w.groups == 1 || w.columns / w.groups % 32 == 0;
  return m.type != DataType::kFloat32 && w.columns % 8 == 0 && whole_units;
}

bool decodes_directly(const Matmul& m) {
  const PackedWeight& w = m.weight;
  if (m.type == DataType::kFloat32) return m.tokens <= most_float_tokens(w.bits, w.planes());
  return fits_tensor_cores(m) && (m.tokens <= kMaxDecodeTokens || w.planes() <= 2);
}

// Places in the workspace of a product of rounded activations; returns the bytes that they take. `at` may be null.
// `ordered` ends in 32 zeros, which columns of B read that have no token's half step to multiply.
std::size_t lay_out(const Matmul& m, const Int8Plan& plan, char* at, Int8Kernel* k) {
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
Status round_tokens(const Int8Kernel& k, bool in_place, void* stream) {
  const int blocks = ceil_div(k.k.m.weight.groups * k.team, kWarps);
  if (in_place) return launch(round_in_place<T>, dim3(blocks, k.k.m.tokens), kTeamBytes, stream, k);
  return launch(round_activations<T>, dim3(blocks + 1, k.k.m.tokens), kTeamBytes, stream, k);
}

Status round_any(const Int8Kernel& k, bool in_place, void* stream) {
  if (k.k.m.type == DataType::kFloat32) return round_tokens<Float>(k, in_place, stream);
  return k.k.m.type == DataType::kFloat16 ? round_tokens<Half>(k, in_place, stream)
                                          : round_tokens<BFloat>(k, in_place, stream);
}

// Gives a product of up to 16 tokens what blocks that share a panel need.
// A few KB of counters and up to 3 MB of sums: 768 blocks at most, of 16 tokens times 32 rows in fp32.
void place_shares(MatmulKernel& k, char* at) {
  if (most_shares(k.m.weight.rows) < 2) return;
  k.arrivals = reinterpret_cast<unsigned*>(at);
  k.shares = reinterpret_cast<float*>(at + aligned(sizeof(unsigned) * ceil_div(k.m.weight.rows, kPanel)));
}

// u stands first in the workspace, in fp32, (M, R).
std::size_t u_bytes(const Matmul& m) { return aligned(sizeof(float) * static_cast<std::size_t>(m.rank) * m.tokens); }

// The product of rounded activations by int8 tensor cores.
// Three launches with a branch, two without: rounding, which also makes the levels bytes and clears the counters; x
// down^T; the product.
Status int8_product(const Matmul& m, const Int8Plan& plan, void* stream) {
  Int8Kernel k{{m, static_cast<float*>(m.workspace)}, plan};
  k.team = team_of(m.weight);
  char* at = static_cast<char*>(m.workspace) + u_bytes(m);
  at += lay_out(m, plan, at, &k);
  place_shares(k.k, at);
  if (const Status status = round_any(k, false, stream); !status.ok()) return status;
  if (m.rank > 0) {
    const Status status = launch(branch_down_int8<>, dim3(m.rank, m.tokens), kTeamBytes, stream, k);
    if (!status.ok()) return status;
  }
  return by_width<Int8Entry>(m.weight.bits, [](auto width, const auto&... all) { return width.decode(all...); }, k, stream);
}

// x once more in its own type, rounded.
std::size_t rounded_bytes(const Matmul& m) {
  return aligned(element_size(m.type) * static_cast<std::size_t>(m.tokens) * m.weight.columns);
}

Status multiply(const Matmul& m, void* stream);

// Rounded activations as floats, and then the product of those: for what has no int8 form, and many tokens.
// An element is rounded and scaled back in its own type, so that the products after it are those of unrounded
// activations. Their levels and factors stay as they are stored, a difference from plugins/int8.py within 1 / 254 of a
// level.
Status rounded_product(Matmul m, void* stream) {
  Int8Kernel k{{m}, {}};
  k.team = team_of(m.weight);
  k.ordered = static_cast<std::int8_t*>(m.workspace);
  if (const Status status = round_any(k, true, stream); !status.ok()) return status;
  m.x = m.workspace;
  m.workspace = static_cast<char*>(m.workspace) + rounded_bytes(m);
  m.int8_activations = false;
  return multiply(m, stream);
}

// The weight decoded into scratch, all of it or in parts, and multiplied.
// With many tokens the second product of a part reads what the first has left in the second-level cache, if it fits.
Status dense_product(MatmulKernel k, void* stream) {
  const int at_once = dense_rows(k.m), rows = k.m.weight.rows;
  for (k.first_row = 0; k.first_row < rows; k.first_row += at_once) {
    k.dense_rows = rows - k.first_row < at_once ? rows - k.first_row : at_once;
    const DenseKernel part{k.m.weight, k.dense, k.first_row / kPanel, k.dense_rows};
    const Status decoded = by_width(
        k.m.weight.bits, [](auto width, const auto&... rest) { return width.dense(rest...); }, part, k.m.type, stream);
    if (!decoded.ok()) return decoded;
    if (const Status status = product(k, stream); !status.ok()) return status;
  }
  return {};
}

// Order and tiles of a product of experts, behind u; returns the bytes that they take. `at` may be null.
std::size_t lay_out(const Matmul& m, char* at, ExpertKernel* k) {
  const std::size_t order = aligned(sizeof(int) * static_cast<std::size_t>(m.tokens));
  k->order = reinterpret_cast<int*>(at);
  k->tiles = reinterpret_cast<TokenTile*>(at == nullptr ? nullptr : at + order);
  return order + aligned(sizeof(TokenTile) * static_cast<std::size_t>(expert_tiles(m.tokens, m.experts)));
}

template <typename T>
Status experts_u(const ExpertKernel& k, void* stream) {
  const dim3 grid(ceil_div(k.k.m.rank, kBranchRanks), eights(k));
  return launch(experts_down<T>, grid, sizeof(float) * 32 * kWarps + list_bytes(kExpertTokens), stream, k);
}

// One to three launches, two of them with a branch. With few tokens no block has more than eight tokens to multiply, on
// average: codes are then read about once, and nothing waits for an order.
Status experts_product(const Matmul& m, void* stream) {
  ExpertKernel k{{m, static_cast<float*>(m.workspace)}};
  const bool few = m.tokens <= kFewTokens && m.tokens <= kExpertTokens * m.experts;
  if (!few) {
    lay_out(m, static_cast<char*>(m.workspace) + u_bytes(m), &k);
    const Status status = launch(sort_tokens<>, dim3(m.experts + 1), sizeof(unsigned) * kWarps, stream, k);
    if (!status.ok()) return status;
  }
  if (m.rank > 0) {
    const Status status = m.type == DataType::kFloat32   ? experts_u<Float>(k, stream)
                          : m.type == DataType::kFloat16 ? experts_u<Half>(k, stream)
                                                         : experts_u<BFloat>(k, stream);
    if (!status.ok()) return status;
  }
  const int bits = m.weight.bits;
  if (!fits_tensor_cores(m) || m.weight.planes() > 2) {
    return by_width<ExpertsEntry>(bits, [](auto width, const auto&... all) { return width.any(all...); }, k, stream);
  }
  if (few) return by_width<ExpertsEntry>(bits, [](auto width, const auto&... all) { return width.few(all...); }, k, stream);
  return by_width<ExpertsEntry>(bits, [](auto width, const auto&... all) { return width.many(all...); }, k, stream);
}

// Tokens of one launch.
int most_tokens(const Matmul& m) { return m.experts > 0 ? kMostExpertTokens : kMostTokens; }

// The product of at most `most_tokens` tokens; arguments are checked.
// Three ways: up to 16 tokens read the codes once and multiply as they go; more decode in registers as well, for tiles
// of 64 tokens; what neither takes is decoded to memory.
Status multiply(const Matmul& m, void* stream) {
  if (m.int8_activations) {
    // Decided by sizes alone, so that the workspace could be asked for before.
    const Int8Plan plan = m.experts > 0 ? Int8Plan{} : int8_plan(m.weight, m.tokens);
    return plan.parts > 0 ? int8_product(m, plan, stream) : rounded_product(m, stream);
  }
  if (m.experts > 0) return experts_product(m, stream);
  MatmulKernel k{m, static_cast<float*>(m.workspace)};
  char* rest = static_cast<char*>(m.workspace) + u_bytes(m);
  const bool direct = decodes_directly(m), few = m.tokens <= kMaxDecodeTokens;
  // The same place for either kind of sums: a product has one.
  if (direct && few) place_shares(k, rest);
  else k.shares = reinterpret_cast<float*>(rest);
  if (m.rank > 0) {
    if (const Status status = any_down(k, stream); !status.ok()) return status;
  }
  if (direct && few) {
    return by_width(m.weight.bits, [](auto width, const auto&... all) { return width.decode(all...); }, k, stream);
  }
  if (direct) {
    return by_width(m.weight.bits, [](auto width, const auto&... all) { return width.prefill(all...); }, k, stream);
  }
  k.dense = rest;
  return dense_product(k, stream);
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

Status launch_matmul(const Matmul& m, void* stream) {
  if (const Status status = check(m.weight); !status.ok()) return status;
  if (m.tokens < 0 || m.rank < 0) return {"the number of tokens and the rank must not be negative"};
  if (m.tokens == 0) return {};
  if (misaligned(m.x, 16) || misaligned(m.y, 16)) return {"x and y must be aligned to 16 bytes"};
  if (misaligned(m.bias, 4)) return {"bias must be aligned to 4 bytes"};
  if (m.experts < 0 || m.experts > kMostExperts) return {"a stack must hold 1 to 4096 experts"};
  if (misaligned(m.numbers, 8) || (m.experts > 0 && m.numbers == nullptr)) {
    return {"the product of experts needs the number of the expert of each token, aligned to 8 bytes"};
  }
  if (m.rank > 0) {
    if (const Status s = check_factor(m.down, "down must be aligned to 4 bytes, its scale to one element"); !s.ok()) return s;
    if (const Status s = check_factor(m.up, "up must be aligned to 4 bytes, its scale to one element"); !s.ok()) return s;
  }
  if (m.workspace == nullptr && matmul_workspace(m) > 0) {
    return {"the product needs a workspace of matmul_workspace() bytes"};
  }
  if (misaligned(m.workspace, 16)) return {"the workspace must be aligned to 16 bytes"};
  // Tokens are y of most grids. More than fit there are multiplied in slices, each of whole tiles and rows of 16 bytes.
  for (int first = 0; first < m.tokens; first += most_tokens(m)) {
    Matmul slice = m;
    slice.tokens = m.tokens - first < most_tokens(m) ? m.tokens - first : most_tokens(m);
    // Slices follow each other in the stream and use one workspace.
    const std::size_t before = element_size(m.type) * static_cast<std::size_t>(first);
    slice.x = static_cast<const char*>(m.x) + before * m.weight.columns;
    slice.y = static_cast<char*>(m.y) + before * m.weight.rows;
    if (m.experts > 0) slice.numbers = m.numbers + first;
    if (const Status status = multiply(slice, stream); !status.ok()) return status;
  }
  return {};
}

Status launch_gather(const Gather& g, void* stream) {
  if (const Status status = check(g.weight); !status.ok()) return status;
  if (g.count <= 0) return {};
  return by_width(g.weight.bits, [](auto width, const auto&... rest) { return width.gather(rest...); }, g, stream);
}

// For runtimes that want the weight itself; products use parts of it.
Status launch_dense(const PackedWeight& w, void* y, DataType type, void* stream) {
  if (const Status status = check(w); !status.ok()) return status;
  const DenseKernel k{w, y, 0, w.rows};
  return by_width(w.bits, [](auto width, const auto&... rest) { return width.dense(rest...); }, k, type, stream);
}

}  // namespace rankbook::cuda
