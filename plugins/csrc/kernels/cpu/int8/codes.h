#pragma once

// What the inner loops of the int8 mode read: activations, codes, levels and parameters. A lane holds four inputs of one
// row. Which four follows from the width, so that one shift and one mask extract them: stage() brings activations into
// that order.
//
// Compiled without contraction of a * b + c: every rounding is part of the definition (plugins/int8.py).

#include <limits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/int8.h"
#include "kernels/cpu/simd/prefetch.h"

namespace rankbook {
namespace {
namespace int8_loops {

using F = Simd::F;
using I = Bytes::I;

inline constexpr int kLanes = Simd::kLanes;
inline constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanes;

// Four activations that lie side by side meet four codes of each row: one broadcast of a dword serves all rows.
inline I broadcast(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, sizeof bits);
  return Bytes::set(bits);
}

// ---------------------------------------------------------------------------------------------- activations

// Input of a block whose activation is byte `at` of the staged block.
// Activations are permuted, once a token, instead of codes, once a weight. The order is what one shift brings out of a
// word: with 4 bits the low nibbles of its bytes are the even inputs of eight, the high ones the odd ones.
constexpr int staged_input(int bits, int at) {
  const int lane = at / 4;
  const int byte = at % 4;
  switch (bits) {
    case 2:
      return lane / 4 * 16 + byte * 4 + lane % 4;
    case 3:
      return byte * 8 + lane;
    case 4:
      return lane / 2 * 8 + byte * 2 + lane % 2;
    default:
      return at;
  }
}

// How half a block is shuffled: 2 and 4 bits stay within 16 bytes; 3 bits bring the two bytes of a lane together, which
// are then interleaved with those of the other half.
// A shuffle of 16 bytes stays within its half of a register on every instruction set, and so does this order but for 3
// bits.
template <int kBits>
struct HalfOrder {
  alignas(16) uint8_t from[16] = {};
  constexpr HalfOrder() {
    for (int at = 0; at < 16; ++at) from[at] = static_cast<uint8_t>(kBits == 3 ? at % 2 * 8 + at / 2 : staged_input(kBits, at));
  }
};

template <int kBits>
void stage_blocks(const int8_t* natural, int64_t blocks, int8_t* out) {
  static constexpr HalfOrder<kBits> kOrder;
  for (int64_t block = 0; block < blocks; ++block, natural += kBlock, out += kBlock) {
    Bytes::reorder<kBits == 3>(natural, kOrder.from, out);
  }
}

// Blocks of 32 activations from the natural order to that of 2, 3 or 4 bits (8 bits have the natural one), also in place.
void stage(int bits, const int8_t* natural, int64_t blocks, int8_t* out) {
  switch (bits) {
    case 2:
      return stage_blocks<2>(natural, blocks, out);
    case 3:
      return stage_blocks<3>(natural, blocks, out);
    default:
      return stage_blocks<4>(natural, blocks, out);
  }
}

// Rounds one group of activations, count a multiple of 16; returns the scale.
// The largest magnitude by integer maxima of the bits without their sign: fp32 numbers that are not negative are
// ordered as their bits are. Below 2^-100 the inverse would overflow, and the definition says zeros.
float quantize_group(const float* x, int64_t count, int8_t* out, int32_t& sum) {
  I bits = Bytes::set(0);
  for (int64_t k = 0; k < count; k += kLanes) bits = Bytes::max(bits, Bytes::bits_of(Simd::load(x + k)));
  const int32_t stored = Bytes::largest(bits);  // as integers, infinities and NaNs are the largest
  float largest;
  std::memcpy(&largest, &stored, sizeof largest);
  const bool finite = stored < 0x7F800000;
  sum = 0;
  if (!finite || largest < 0x1p-100F) {
    std::memset(out, 0, static_cast<size_t>(count));
    return finite ? 0.0F : std::numeric_limits<float>::quiet_NaN();
  }
  const F inverse = Simd::set(127.0F / largest);
  I total = Bytes::set(0);
  for (int64_t k = 0; k < count; k += kLanes) {
    const I rounded = Bytes::round(multiply(Simd::load(x + k), inverse));
    total = Bytes::add(total, rounded);
    Bytes::narrow(out + k, rounded);
  }
  sum = Bytes::total(total);
  return largest / 127.0F;
}

// Rounds one group into whole blocks in the natural order, zeros around it.
// Groups of an odd multiple of 16 begin inside a block of codes: the activations before and behind them are zeros, so
// that the codes of the neighbouring group, which share the block, count for nothing.
void quantize_blocks(const float* x, int64_t group, int64_t lead, int64_t bytes, int8_t* out, int32_t& sum, float& scale) {
  if (bytes != group) std::memset(out, 0, static_cast<size_t>(bytes));
  if (group % kHalfBlock == 0) {
    scale = quantize_group(x, group, out + lead, sum);
    return;
  }
  // A group of another length is the whole row; rare, so plain code.
  scale = round_row(x, group, out);
  sum = 0;
  for (int64_t k = 0; k < group; ++k) sum += out[k];
}

// Two copies where a branch needs the natural order beside that of the width. float(sum) * scale is kept as well: each
// offset of each row is multiplied by it.
void quantize(const Int8Weight& weight, const float* x, int64_t token, const StagedRows& natural, const StagedRows& staged) {
  const int64_t group = weight.weight.in_features / weight.weight.groups;
  const int64_t bytes = weight.group_blocks() * kBlock;
  for (int64_t g = 0; g < weight.weight.groups; ++g, x += group) {
    const int64_t at = g * natural.tokens + token;
    const int64_t lead = g * weight.group_halves() % 2 * kHalfBlock;
    quantize_blocks(x, group, lead, bytes, natural.codes + at * bytes, natural.sums[at], natural.scales[at]);
    natural.shifts[at] = static_cast<float>(natural.sums[at]) * natural.scales[at];
    if (weight.weight.bits != 8) {
      stage(weight.weight.bits, natural.codes + at * bytes, weight.group_blocks(), staged.codes + at * bytes);
    }
  }
}

// ---------------------------------------------------------------------------------------------- code extraction

template <int kBits>
inline constexpr int kWords = kBits;  // words of a block for one row

// The words of one block for one vector of rows, and which bits of them, with which table, are lane kIndex of x.
// No mask anywhere: a byte table looks at the low four bits of an index alone (on AVX2 after an `and`, in lookup), and
// tables are repeated where a code has fewer.
template <int kBits>
struct Block {
  I words[kWords<kBits>];
  explicit Block(const uint8_t* from) {
    RANKBOOK_UNROLL
    for (int i = 0; i < kWords<kBits>; ++i) words[i] = Bytes::load(from + i * kWordBytes);
  }
  template <int kIndex>
  I index() const {
    if constexpr (kBits == 8) {
      return words[kIndex];
    } else if constexpr (kBits == 4) {
      return kIndex % 2 == 0 ? words[kIndex / 2] : Bytes::shift<4>(words[kIndex / 2]);
    } else if constexpr (kBits == 2) {
      return kIndex % 4 < 2 ? words[kIndex / 4] : Bytes::shift<4>(words[kIndex / 4]);
    } else if constexpr (kIndex < 6) {
      return kIndex % 2 == 0 ? words[kIndex / 2] : Bytes::shift<3>(words[kIndex / 2]);
    } else {  // two bits at the top of A (or B), the third at bit 6 (or 7) of C
      return Bytes::merge<3>(Bytes::shift<6>(words[kIndex - 6]), Bytes::shift<kIndex - 2>(words[2]));
    }
  }
  static constexpr int table_of(int index) {
    return kBits == 4 ? index % 2 : kBits == 3 ? (index < 6 ? 0 : index - 5) : index % 4 == 1 ? 1 : index % 4 == 3 ? 2 : 0;
  }
};

template <int kBits>
inline constexpr int kTables = kBits == 4 ? 2 : 3;

// The levels of one plane in registers.
// Two or three registers of 16 entries a plane, where one would do but for the flipped top bit of each stored byte: the
// entries of the table for the upper code are in the order that the flip asks for.
template <int kBits>
struct PlaneLevels {
  I entries[kTables<kBits>];
  explicit PlaneLevels(const PlaneTable& table) {
    RANKBOOK_UNROLL
    for (int i = 0; i < kTables<kBits>; ++i) entries[i] = Bytes::table(table.nibble[i]);
  }
  template <int kIndex>
  I entry(I index) const {
    return Bytes::lookup(entries[Block<kBits>::table_of(kIndex)], index);
  }
};

// 256 entries fit no register. Affine formats need none (`straight`); others are looked up byte by byte, through
// memory, and are for embeddings rather than for products.
template <>
struct PlaneLevels<8> {
  const PlaneTable* table;
  bool straight, flipped;
  // Code 0, which the carrier holds as 0x80, has the entry 0 in an unsigned table and 0x80 in a signed one.
  explicit PlaneLevels(const PlaneTable& from) : table(&from), straight(from.straight), flipped(from.bytes[0x80] == 0) {}
  template <int>
  I entry(I index) const {
    if (straight) return flipped ? Bytes::flip(index) : index;
    alignas(64) uint8_t bytes[sizeof(I)];
    Bytes::store(bytes, index);
    for (uint8_t& byte : bytes) byte = table->bytes[byte];
    return Bytes::load(bytes);
  }
};

// Levels are the unsigned operand of vpdpbusd, activations the signed one, which is why a table holds levels less their
// lowest.
template <bool kSigned, class B = Bytes>
inline I dot(I sum, I entries, I x) {
  if constexpr (kSigned) {
    return B::dot_signed(sum, entries, x);
  } else {
    return B::dot(sum, entries, x);
  }
}

inline const uint8_t* codes_of(const CodebookWeight& weight, int64_t panel) {
  return weight.codes + panel * weight.blocks() * weight.bits * kWordBytes;
}

inline int64_t first_block(const Int8Weight& weight, int64_t group) { return group * weight.group_halves() / 2; }

// ---------------------------------------------------------------------------------------------- scaling

// Parameters of rows [row, row + lanes) of a panel for one group and plane.
// As `param` of packed/kernels.h, with the unit of whole-numbered levels already in step and base, so that the plane
// costs one rounding as in the definition.
inline F value_of(const Int8Weight& weight, int64_t panel, int64_t group, int64_t plane, int row) {
  const CodebookWeight& w = weight.weight;
  const int64_t planes = w.param_planes();
  const int64_t at = ((panel * w.groups + group) * planes + plane) * kPanel + row;
  const int64_t scale = (weight.per_panel ? panel * planes : 0) + plane;
  const F stored = w.form == ParamForm::kInt8      ? Simd::from_int8(static_cast<const int8_t*>(w.params) + at)
                   : w.form == ParamForm::kFloat16 ? Simd::from_half(static_cast<const uint16_t*>(w.params) + at)
                                                   : Simd::load(static_cast<const float*>(w.params) + at);
  return fused(stored, Simd::set(weight.step[scale]), Simd::set(weight.base[scale]));
}

void values(const Int8Weight& weight, int64_t panel, int64_t group, int64_t plane, float* out) {
  for (int row = 0; row < kPanel; row += kLanes) Simd::store(out + row, value_of(weight, panel, group, plane, row));
}

}  // namespace int8_loops
}  // namespace
}  // namespace rankbook
