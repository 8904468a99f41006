// The order in which the kernels of one product, or of several of one x, run; for launch.cu alone.
//
// A product is at most these launches: rounding of x (A8), the order of many tokens by expert, u = x down^T, the product,
// the sum of shares. Behind the first kernel all may start early (`Start`), those of experts excepted. Kernels of one width
// are behind WidthEntry, Int8Entry and ExpertsEntry, so that this file compiles none of them. Arguments are checked.
#pragma once

#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/experts_launch.cuh"
#include "kernels/cuda/int8_launch.cuh"
#include "kernels/cuda/launch.h"

namespace rankbook::cuda {
namespace {

// What cudaMalloc gives, so that every part of the workspace may be read by vectors and starts a cache line of its own.
constexpr std::size_t kAlign = 256;
constexpr int kMostTokens = kMostBlocksY / 64 * 64;  // of one launch

std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

bool misaligned(const void* pointer, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0; }

// Rows of a weight that are decoded into scratch at once: all, or as many tiles of 64 as fit `kMostDense`.
// Parts start at whole tiles of the product, which are whole panels of the weight as well.
int dense_rows(const Matmul& m) {
  const std::size_t row = element_size(m.type) * static_cast<std::size_t>(m.weight.columns);
  const std::size_t most = kMostDense / row / 64 * 64, rows = static_cast<std::size_t>(m.weight.rows);
  return static_cast<int>(rows <= most ? rows : most < 64 ? (rows < 64 ? rows : 64) : most);
}

template <template <int> class Entry = WidthEntry, typename Call, typename... Arguments>
auto by_width(int bits, Call call, const Arguments&... arguments) {
  switch (bits) {
    case 2: return call(Entry<2>{}, arguments...);
    case 3: return call(Entry<3>{}, arguments...);
    case 4: return call(Entry<4>{}, arguments...);
    default: return call(Entry<8>{}, arguments...);
  }
}

// By tensor cores for many tokens, if the factor can be read in pieces of 16 bytes.
template <typename T>
Status down(const MatmulKernel& k, Start start, void* stream) {
  if constexpr (T::kType != DataType::kFloat32) {
    const Factor& factor = k.m.down;
    const bool pieces = factor.codes_full && !factor.scale_full && k.m.weight.columns % 16 == 0 && !misaligned(factor.codes, 16);
    const int across = ceil_div(k.m.rank, kBranchMmaRanks);
    const bool wide = across * ceil_div(k.m.tokens, 8) > kWideBranch;
    const dim3 grid(across * k.u_shares, ceil_div(k.m.tokens, wide ? 16 : 8)), plain = branch_grid(k.m);
    // Fewer and longer blocks, which pay where they run beside the product or where the others are more than fit at once.
    const bool pays = starts_early(branch_down_mma<T, 1>) || static_cast<int>(plain.x * plain.y) > kWideBranch;
    if (k.m.tokens > kMaxDecodeTokens && pieces && pays) {
      return wide ? launch(branch_down_mma<T, 2>, grid, branch_mma_bytes(2), stream, k, start)
                  : launch(branch_down_mma<T, 1>, grid, branch_mma_bytes(1), stream, k, start);
    }
  }
  const dim3 each = branch_grid(k.m);
  return launch(branch_down<T>, dim3(each.x * k.u_shares, each.y), sizeof(float) * 32 * kWarps, stream, k, start);
}

// x down^T, with as many shares of its columns as `k` is told of here.
Status any_down(MatmulKernel& k, Start start, void* stream) {
  k.u_shares = branch_shares(k.m, starts_early(branch_down<Float>));
  if (k.m.type == DataType::kFloat32) return down<Float>(k, start, stream);
  return k.m.type == DataType::kFloat16 ? down<Half>(k, start, stream) : down<BFloat>(k, start, stream);
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
Status round_tokens(const RoundKernel& k, void* stream) {
  const Matmul& m = k.x.k.m;
  const int blocks = ceil_div(m.weight.groups * k.x.team, kWarps);
  return launch(round_activations<T>, dim3(blocks + k.count, m.tokens), kTeamBytes, stream, k);
}

Status round_any(const RoundKernel& k, void* stream) {
  const DataType type = k.x.k.m.type;
  if (type == DataType::kFloat32) return round_tokens<Float>(k, stream);
  return type == DataType::kFloat16 ? round_tokens<Half>(k, stream) : round_tokens<BFloat>(k, stream);
}

Status round_in_place_any(const Int8Kernel& k, void* stream) {
  const dim3 grid(ceil_div(k.k.m.weight.groups * k.team, kWarps), k.k.m.tokens);
  const DataType type = k.k.m.type;
  if (type == DataType::kFloat32) return launch(round_in_place<Float>, grid, kTeamBytes, stream, k);
  return type == DataType::kFloat16 ? launch(round_in_place<Half>, grid, kTeamBytes, stream, k)
                                    : launch(round_in_place<BFloat>, grid, kTeamBytes, stream, k);
}

// Gives a product of up to 16 tokens what blocks that share a panel need.
// A few KB of counters and up to 3 MB of sums: 768 blocks at most, of 16 tokens times 32 rows in fp32.
void place_shares(MatmulKernel& k, char* at) {
  if (most_shares(k.m.weight.rows) < 2) return;
  k.arrivals = reinterpret_cast<unsigned*>(at);
  k.shares = reinterpret_cast<float*>(at + aligned(sizeof(unsigned) * ceil_div(k.m.weight.rows, kPanel)));
}

// u stands first in the workspace, in fp32, (shares, M, R): room for what any GPU takes, and for fewer tokens.
std::size_t u_bytes(const Matmul& m) {
  const int shared = kMostUShares * (m.tokens < kMostUTokens ? m.tokens : kMostUTokens);
  return aligned(sizeof(float) * static_cast<std::size_t>(m.rank) * (m.tokens < shared ? shared : m.tokens));
}

// Products of one x. Every one has a place of its own in the workspace, because their kernels may run side by side.
struct Products {
  const Matmul* all;
  int count;
  std::size_t bytes[kMostProducts] = {};  // before the place of each

  Products(const Matmul* all_, int count_) : all(all_), count(count_) {
    for (int i = 1; i < count; ++i) bytes[i] = bytes[i - 1] + aligned(matmul_workspace(all[i - 1]));
  }
  char* place(int i) const { return static_cast<char*>(all[0].workspace) + bytes[i]; }
};

// By int8 tensor cores. Rounding, once, which also makes the levels bytes and clears the counters; x down^T of those that
// have a branch; the products.
Status int8_products(const Products& products, const Int8Plan& plan, void* stream) {
  Int8Kernel kernels[kMostProducts];
  RoundKernel rounding;
  std::int8_t* natural = nullptr;
  for (int i = 0; i < products.count; ++i) {
    const Matmul& m = products.all[i];
    Int8Kernel& k = kernels[i];
    k.k.m = m, k.plan = plan, k.team = team_of(m.weight);
    k.k.u = reinterpret_cast<float*>(products.place(i));
    char* at = products.place(i) + u_bytes(m);
    at += lay_out(m, plan, at, &k);
    place_shares(k.k, at);
    if (m.rank > 0) natural = k.natural;
    rounding.products[rounding.count++] = {m.weight, k.levels, k.k.arrivals};
  }
  kernels[0].natural = natural;
  for (int i = 1; i < products.count; ++i) {
    kernels[i].ordered = kernels[0].ordered, kernels[i].natural = natural, kernels[i].rounded = kernels[0].rounded;
  }
  rounding.x = kernels[0];
  if (const Status status = round_any(rounding, stream); !status.ok()) return status;
  for (int i = 0; i < products.count; ++i) {
    const Matmul& m = products.all[i];
    if (m.rank == 0) continue;
    const Status status = launch(branch_down_int8<>, dim3(m.rank, m.tokens), kTeamBytes, stream, kernels[i], Start::kEarly);
    if (!status.ok()) return status;
  }
  for (int i = 0; i < products.count; ++i) {
    const Status status = by_width<Int8Entry>(
        products.all[i].weight.bits, [](auto width, const auto&... all) { return width.decode(all...); }, kernels[i], stream);
    if (!status.ok()) return status;
  }
  return {};
}

// x once more in its own type, rounded.
std::size_t rounded_bytes(const Matmul& m) {
  return aligned(element_size(m.type) * static_cast<std::size_t>(m.tokens) * m.weight.columns);
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

// Up to 16 tokens: x down^T of all products, which also clears the counters, and the products, which wait for it where they
// write y. Without a branch a product of several starts in turn, for a memset clears the counters.
Status few_products(const Products& products, void* stream) {
  MatmulKernel kernels[kMostProducts];
  Start start = Start::kInTurn;
  for (int i = 0; i < products.count; ++i) {
    MatmulKernel& k = kernels[i];
    k.m = products.all[i], k.u = reinterpret_cast<float*>(products.place(i));
    place_shares(k, products.place(i) + u_bytes(k.m));
    if (k.m.rank == 0) continue;
    if (const Status status = any_down(k, start, stream); !status.ok()) return status;
    start = Start::kEarly;
  }
  for (int i = 0; i < products.count; ++i) {
    const Status status = by_width(
        kernels[i].m.weight.bits, [](auto width, const auto&... all) { return width.decode(all...); }, kernels[i], stream);
    if (!status.ok()) return status;
  }
  return {};
}

template <typename T>
Status add_any_shares(const PrefillKernel& p, void* stream) {
  const dim3 grid(ceil_div(p.k.m.weight.rows, 4 * 32), ceil_div(p.k.m.tokens, kWarps));
  return launch(add_shares<T>, grid, 0, stream, p, Start::kEarly);
}

// More tokens, decoded in registers as well. The product needs x down^T at the end of a tile only, and runs beside it where
// registers leave room for a block of both.
Status many_tokens(MatmulKernel& k, void* stream) {
  const int bits = k.m.weight.bits;
  const bool branch = k.m.rank > 0;
  if (branch) {
    if (const Status status = any_down(k, Start::kInTurn, stream); !status.ok()) return status;
  }
  const PrefillKernel p{k, by_width(bits, [](auto width, const auto& m) { return width.prefill_split(m); }, k.m)};
  const Status status = by_width(
      bits, [](auto width, const auto&... all) { return width.prefill(all...); }, p, branch ? Start::kEarly : Start::kInTurn, stream);
  if (!status.ok() || p.split.whole()) return status;
  return k.m.type == DataType::kFloat16 ? add_any_shares<Half>(p, stream) : add_any_shares<BFloat>(p, stream);
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

// One product of more tokens, of what is decoded to memory, or of experts.
Status alone(const Matmul& m, void* stream) {
  if (m.experts > 0) return experts_product(m, stream);
  MatmulKernel k{m, static_cast<float*>(m.workspace)};
  char* rest = static_cast<char*>(m.workspace) + u_bytes(m);
  if (decodes_directly(m)) {
    k.shares = reinterpret_cast<float*>(rest);
    return many_tokens(k, stream);
  }
  k.dense = rest;
  if (m.rank > 0) {
    if (const Status status = any_down(k, Start::kInTurn, stream); !status.ok()) return status;
  }
  return dense_product(k, stream);
}

// Products of at most `most_tokens` tokens that are not rounded.
// Three ways: up to 16 tokens read the codes once and multiply as they go; more decode in registers as well, for tiles of 64
// tokens; what neither takes is decoded to memory.
Status multiply_plain(const Matmul* all, int count, void* stream) {
  bool few = all[0].tokens <= kMaxDecodeTokens && all[0].experts == 0;
  for (int i = 0; i < count; ++i) few = few && decodes_directly(all[i]);
  if (few) return few_products({all, count}, stream);
  for (int i = 0; i < count; ++i) {
    Matmul m = all[i];
    m.workspace = all[0].workspace;  // one after the other
    const bool direct = decodes_directly(m) && m.tokens <= kMaxDecodeTokens && m.experts == 0;
    if (const Status status = direct ? few_products({&m, 1}, stream) : alone(m, stream); !status.ok()) return status;
  }
  return {};
}

bool rounds_alike(const Matmul& a, const Matmul& b) {
  const Int8Plan p = int8_plan(a.weight, a.tokens), q = int8_plan(b.weight, b.tokens);
  return a.weight.groups == b.weight.groups && a.weight.bits == b.weight.bits && p.parts == q.parts;  // which decide the rest
}

// Rounded activations as floats, and then the products of those: for what has no int8 form, and many tokens.
// An element is rounded and scaled back in its own type, so that the products after it are those of unrounded
// activations. Their levels and factors stay as they are stored, a difference from plugins/int8.py within 1 / 254 of a
// level.
Status rounded_products(const Matmul* all, int count, void* stream) {
  Int8Kernel k{{all[0]}, {}};
  k.team = team_of(all[0].weight);
  k.ordered = static_cast<std::int8_t*>(all[0].workspace);
  if (const Status status = round_in_place_any(k, stream); !status.ok()) return status;
  Matmul plain[kMostProducts];
  for (int i = 0; i < count; ++i) {
    plain[i] = all[i];
    plain[i].x = all[0].workspace, plain[i].workspace = static_cast<char*>(all[0].workspace) + rounded_bytes(all[0]);
    plain[i].int8_activations = false;
  }
  return multiply_plain(plain, count, stream);
}

Status multiply(const Matmul* all, int count, void* stream) {
  if (!all[0].int8_activations) return multiply_plain(all, count, stream);
  for (int i = 1; i < count; ++i) {
    if (rounds_alike(all[0], all[i])) continue;
    for (int each = 0; each < count; ++each) {
      Matmul m = all[each];
      m.workspace = all[0].workspace;
      if (const Status status = multiply(&m, 1, stream); !status.ok()) return status;
    }
    return {};
  }
  // Decided by sizes alone, so that the workspace could be asked for before.
  const Int8Plan plan = all[0].experts > 0 ? Int8Plan{} : int8_plan(all[0].weight, all[0].tokens);
  return plan.parts > 0 ? int8_products({all, count}, plan, stream) : rounded_products(all, count, stream);
}

}  // namespace
}  // namespace rankbook::cuda
