// Exact decoding in fp32: the parity form of the product (fp32 activations), the dense weight and the look-up of rows.
//
// Layout: a lane takes four rows of a unit (codes.cuh), so that four rows share a load of x, and a warp reads whole
// lines of codes. Levels of all planes are floats in shared memory; coefficients of the group are in registers.
//
// Called through Width<>: decode_float for fp32 x with up to 16 tokens, decode_dense before the tiled products,
// gather_rows for embeddings; the AOT kernels use look_up_rows.
#pragma once

#include "kernels/cuda/branch.cuh"

namespace rankbook::cuda {

// Weights of four rows: a table of levels in shared memory, and the parameters of the lane's group in registers.
// Levels of all planes of a code lie side by side, so that a weight is P reads of neighbouring words. Nothing is
// combined ahead: this form is for parity, where the order of operations is that of the reference.
template <int kBits, int kPlanes>
struct FloatDecoder {
  static constexpr std::size_t kTableBytes = (std::size_t{1} << kBits) * kPlanes * sizeof(float);

  const float* table;
  float coefficients[kPlanes][4];
  float offsets[4];

  // Fills the table (2^bits, planes), planes that the weight lacks with zeros. The caller sets a barrier after it.
  // Three planes are served by the kernels for four, padded with zeros: a third form of every kernel would be compile time and library size for a rare case.
  static RB_DEVICE void fill_table(const PackedWeight& w, float* table) {
    for (int i = thread_index(); i < (1 << kBits) * kPlanes; i += kWarps * 32) {
      const int plane = i % kPlanes;
      table[i] = plane < w.planes() ? half_to_float(load(w.levels + (plane << kBits) + i / kPlanes)) : 0.0f;
    }
  }

  // Once per group and lane: 4 (P + 1) numbers in registers, read as words of four rows.
  RB_DEVICE void set_group(const PackedWeight& w, int panel, int group, int row) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      if (plane < w.planes()) {
        read_params(w, panel, group, plane, row, coefficients[plane]);
      } else {
        coefficients[plane][0] = coefficients[plane][1] = coefficients[plane][2] = coefficients[plane][3] = 0.0f;
      }
    }
    offsets[0] = offsets[1] = offsets[2] = offsets[3] = 0.0f;
    if (w.has_offset) read_params(w, panel, group, w.params_planes - 1, row, offsets);
  }

  RB_DEVICE float weight(int row, std::uint32_t code) const {
    float sum = offsets[row];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) sum += coefficients[plane][row] * table[code * kPlanes + plane];
    return sum;
  }

  // Weights of columns 4 j .. 4 j + 3 of a unit.
  // Four columns at a time, so that activations come as float4 and 16 weights are alive at once, not 64.
  RB_DEVICE void quad(const FourRows<kBits>& rows, int j, float (&out)[4][4]) const {
    constexpr std::uint32_t kMask = (1u << kBits) - 1u;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t pair = code_pair<kBits>(rows.words[row], 2 * j + half);
        out[row][2 * half] = weight(row, pair & kMask);
        out[row][2 * half + 1] = weight(row, pair >> kBits);
      }
    }
  }
};

// Four neighbouring activations from column k on, zero past the end of the row.
// Rows of a length that is no multiple of four are not aligned to 16 bytes from the second token on.
RB_DEVICE float4 load_quad(const float* row, int k, int columns) {
  if ((columns & 3) == 0) {
    return k < columns ? load(reinterpret_cast<const float4*>(row + k)) : float4{0.0f, 0.0f, 0.0f, 0.0f};
  }
  float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
  if (k < columns) v.x = load(row + k);
  if (k + 1 < columns) v.y = load(row + k + 1);
  if (k + 2 < columns) v.z = load(row + k + 2);
  if (k + 3 < columns) v.w = load(row + k + 3);
  return v;
}

// The same of one token of x, in the type X.
template <typename X>
RB_DEVICE float4 load_quad(const Matmul& m, int token, int k) {
  const int columns = m.weight.columns;
  const std::size_t first = static_cast<std::size_t>(token) * columns;
  if constexpr (std::is_same_v<X, AnyType>) {
    if (m.type != DataType::kFloat32) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint16_t bits = k + i < columns ? load(static_cast<const std::uint16_t*>(m.x) + first + k + i) : std::uint16_t{0};
        values[i] = m.type == DataType::kFloat16 ? Half::decode(bits) : BFloat::decode(bits);
      }
      return {values[0], values[1], values[2], values[3]};
    }
  }
  return load_quad(static_cast<const float*>(m.x) + first, k, columns);
}

// The most tokens for which there are registers.
// Four rows times 16 tokens are 64 sums of the 255 registers that a thread may have; 3 bits with four planes hold the
// words of a unit beside 20 parameters and take eight.
constexpr int most_float_tokens(int bits, int planes) { return bits == 3 && planes > 2 ? 8 : kMaxDecodeTokens; }

// y for up to kTokens tokens and fp32 activations. Blocks as for `decode_mma`.
// No tensor cores: TF32 keeps 10 bits of mantissa. With four rows a lane, a load of x is used four times. Speed is that
// of fp32 multiply-adds, about 1 / 15 of the fp16 rate of an H100; fp32 is for checks, not for serving.
template <int kBits, int kPlanes, int kTokens, typename X, bool kShared = true, typename Tokens>
RB_DEVICE void multiply_panel_float(const MatmulKernel& arguments, const Tokens& tokens) {
  using U = Unit<kBits>;
  const Matmul& m = arguments.m;
  const PackedWeight& w = m.weight;
  const int lane = thread_index() & 31, warp = (kShared ? block_y() * kWarps : 0) + (thread_index() >> 5), panel = block_x();
  const int row = 4 * (lane >> 2), units = U::count(w.columns), size = w.columns / w.groups;
  auto* table = reinterpret_cast<float*>(shared_memory());
  FloatDecoder<kBits, kPlanes> decoder{table, {}, {}};
  decoder.fill_table(w, table);
  barrier();

  // A warp takes neighbouring steps, so that it walks through groups in order and reads the parameters of each once.
  const int warps = kShared ? grid_y() * kWarps : kWarps, steps = (units + 3) / 4, share = (steps + warps - 1) / warps;
  const int last = (warp + 1) * share < steps ? (warp + 1) * share : steps;
  GroupCursor cursor;
  float sums[4][kTokens] = {};
  for (int step = warp * share; step < last; ++step) {
    const int unit = 4 * step + (lane & 3);
    const FourRows<kBits> rows = load_four_rows<kBits>(w, panel, unit, units, row);
#pragma unroll
    for (int j = 0; j < U::kColumns / 4; ++j) {
      const int k = unit * U::kColumns + 4 * j;
      if (j % (U::kPairs / 2) == 0 && cursor.advance(k, size, w.groups)) {
        decoder.set_group(w, panel, cursor.group, row);
      }
      float weights[4][4];
      decoder.quad(rows, j, weights);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tokens.count) continue;
        const float4 v = load_quad<X>(m, tokens.at(t), k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i][t] += weights[i][0] * v.x + weights[i][1] * v.y + weights[i][2] * v.z + weights[i][3] * v.w;
        }
      }
    }
  }
  barrier();  // the table is read no more: its memory takes the sums
  auto* partial = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Lanes 4 p to 4 p + 3 hold parts of the same four rows: two shuffles add them up.
      sums[i][t] += shuffle_xor(sums[i][t], 1);
      sums[i][t] += shuffle_xor(sums[i][t], 2);
      if ((lane & 3) == 0) partial[((thread_index() >> 5) * kTokens + t) * kPanel + row + i] = sums[i][t];
    }
  }
  barrier();
  reduce_and_store<X, kShared>(arguments, tokens, partial, panel, kTokens);
}

template <int kBits, int kPlanes, int kTokens>
RB_KERNEL(1) decode_float(MatmulKernel arguments) {
  multiply_panel_float<kBits, kPlanes, kTokens, Float>(arguments, AllTokens{arguments.m.tokens});
}

struct DenseKernel {
  PackedWeight w;
  void* y = nullptr;    // (rows, K)
  int first_panel = 0;  // of the part of the weight that is decoded
  int rows = 0;
};

// Four neighbouring elements of a row, from an address aligned to them on, at once where rows are made of such pieces.
template <typename T>
RB_DEVICE void store_four(typename T::Stored* to, int left, bool whole, const float (&values)[4]) {
  if (!whole) {  // the same for all threads
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < left) store(to + c, T::encode(values[c]));
    }
  } else if (left > 0) {
    if constexpr (T::kType == DataType::kFloat32) {
      store(reinterpret_cast<float4*>(to), float4{values[0], values[1], values[2], values[3]});
    } else {
      store(reinterpret_cast<uint2*>(to), uint2{T::pack(values[0], values[1]), T::pack(values[2], values[3])});
    }
  }
}

// The weight, or a part of its rows, in T. Blocks (x: panel, y: share of the columns). Four lanes write a sector of a row
// between them: their units are neighbours.
template <int kBits, int kPlanes, typename T>
RB_KERNEL(1) decode_dense(DenseKernel arguments) {
  using U = Unit<kBits>;
  const PackedWeight& w = arguments.w;
  const int lane = thread_index() & 31, panel = arguments.first_panel + block_x(), row = 4 * (lane >> 2);
  const int units = U::count(w.columns), size = w.columns / w.groups;
  auto* y = static_cast<typename T::Stored*>(arguments.y);
  auto* table = reinterpret_cast<float*>(shared_memory());
  FloatDecoder<kBits, kPlanes> decoder{table, {}, {}};
  decoder.fill_table(w, table);
  barrier();

  const int warps = grid_y() * kWarps, warp = block_y() * kWarps + (thread_index() >> 5);
  const int steps = (units + 3) / 4, share = (steps + warps - 1) / warps;
  GroupCursor cursor;
  for (int step = warp * share; step < (warp + 1) * share && step < steps; ++step) {
    const int unit = 4 * step + (lane & 3);
    const FourRows<kBits> rows = load_four_rows<kBits>(w, panel, unit, units, row);
#pragma unroll
    for (int j = 0; j < U::kColumns / 4; ++j) {
      const int k = unit * U::kColumns + 4 * j;
      if (j % (U::kPairs / 2) == 0 && cursor.advance(k, size, w.groups)) {
        decoder.set_group(w, panel, cursor.group, row);
      }
      float weights[4][4];
      decoder.quad(rows, j, weights);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = static_cast<int>(block_x()) * kPanel + row + i;
        if (n >= arguments.rows) continue;
        store_four<T>(y + static_cast<std::size_t>(n) * w.columns + k, w.columns - k, (w.columns & 3) == 0, weights[i]);
      }
    }
  }
}

// Rows of W by index; a block per index. Threads take one unit each and, like `decode_dense`, four rows of it: the
// other three are free, since their words share the 16 bytes.
// An embedding of a prompt of 512 tokens is 512 blocks; a decode step is one block, bound by the latency of a table and
// a read.
template <int kBits, int kPlanes>
RB_DEVICE void look_up_rows(const Gather& arguments) {
  using U = Unit<kBits>;
  const PackedWeight& w = arguments.weight;
  const int units = U::count(w.columns), size = w.columns / w.groups;
  auto* table = reinterpret_cast<float*>(shared_memory());
  FloatDecoder<kBits, kPlanes> decoder{table, {}, {}};
  decoder.fill_table(w, table);
  barrier();

  for (std::int64_t i = block_x(); i < arguments.count; i += grid_x()) {
    // NaN and not a clamped row: a wrong token number should be seen in the output.
    const std::int64_t index = load(arguments.indices + i);
    float* y = arguments.y + i * w.columns;
    const bool valid = index >= 0 && index < w.rows;
    const int panel = valid ? static_cast<int>(index / kPanel) : 0, row = valid ? static_cast<int>(index % kPanel) : 0;
    for (int unit = thread_index(); unit < units; unit += kWarps * 32) {
      // A row is 4 of every 128 bytes of its panel: 16 bytes are read where 4 are wanted, of sectors of 32.
      const FourRows<kBits> rows = load_four_rows<kBits>(w, panel, unit, units, row & ~3);
      GroupCursor cursor;
#pragma unroll
      for (int j = 0; j < U::kColumns / 4; ++j) {
        const int k = unit * U::kColumns + 4 * j;
        if (j % (U::kPairs / 2) == 0 && cursor.advance(k, size, w.groups)) {
          decoder.set_group(w, panel, cursor.group, row & ~3);
        }
        float weights[4][4], values[4];
        decoder.quad(rows, j, weights);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float value = weights[0][c];  // a chain of selections: an index known only at run time would spill
#pragma unroll
          for (int other = 1; other < 4; ++other) value = (row & 3) == other ? weights[other][c] : value;
          values[c] = valid ? value : float_of(0x7fc00000u);
        }
        store_four<Float>(y + k, w.columns - k, (w.columns & 3) == 0, values);
      }
    }
  }
}

template <int kBits, int kPlanes>
RB_KERNEL(1) gather_rows(Gather arguments) {
  look_up_rows<kBits, kPlanes>(arguments);
}

}  // namespace rankbook::cuda
