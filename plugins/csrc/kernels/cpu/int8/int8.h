#pragma once

// The int8 mode: activations rounded to 8 bits inside, products in integers, then fp32 in a fixed order. What is computed,
// to the last bit, stands in plugins/int8.py. Letters as in codebook.h.

#include <cstdint>

#include "kernels/cpu/packed/codebook.h"

namespace rankbook {

inline constexpr int64_t kLargestGroup = 65536;  // inputs; beyond, an int32 sum could overflow

// One plane of whole-numbered levels in the form that the inner loops look up: level = entry + centre. Entries are uint8,
// or int8 where Int8Weight::is_signed. prepare_table() fills it.
struct PlaneTable {
  alignas(16) uint8_t nibble[3][16] = {};  // 2, 3 and 4 bits; several, since the carrier flips the top bit of each byte
  uint8_t bytes[256] = {};                 // 8 bits, by byte of the carrier
  bool straight = false;                   // 8 bits: the entry is the code itself, nothing to look up
  int32_t centre = 0;
};

struct Int8Weight {
  CodebookWeight weight;               // its levels, slopes, step and base are not used
  const PlaneTable* tables = nullptr;  // (P)
  bool is_signed = false;
  const float* step = nullptr;         // (NP, Q) or (Q): value = params * step + base
  const float* base = nullptr;
  bool per_panel = false;              // which of the two

  // Blocks of 32 inputs that a group touches. Groups of an odd multiple of 16 begin or end inside a block: the rest of that
  // block is multiplied by zeros.
  RANKBOOK_INLINE int64_t group_halves() const { return ceil_div(weight.in_features / weight.groups, kHalfBlock); }
  RANKBOOK_INLINE int64_t group_blocks() const { return ceil_div(group_halves(), 2); }
  RANKBOOK_INLINE int64_t staged_bytes() const { return weight.groups * group_blocks() * kBlock; }
};

struct Int8Branch {
  int64_t rank = 0;         // R; 0 means none
  Int8Weight down;       // R out features of 8 straight bits, groups as in the weight, values one
  PanelFactor up;           // (NP, R, 32)
  const float* middle = nullptr;  // (R)
};

// Activations as the inner loops read them: the tokens of a group side by side.
struct StagedRows {
  int64_t tokens = 0;        // M
  int8_t* codes = nullptr;   // (G, M, group_blocks, 32), in the order of the width, see stage() in codes.h
  int32_t* sums = nullptr;   // (G, M)
  float* scales = nullptr;   // (G, M)
  float* shifts = nullptr;   // (G, M): float(sums) * scales
};

struct Int8Product {
  Int8Weight weight;
  Int8Branch branch;
  const float* bias = nullptr;  // (N), or null
  float* y = nullptr;           // (M, N)
};

inline constexpr int kMostProducts = 3;  // query, key and value

// Products of one x, which is rounded once. Their weights have the same width and groups.
struct Int8Args {
  const Int8Product* products = nullptr;
  int count = 0;                 // of products, up to kMostProducts
  const float* x = nullptr;        // (M, K)
  int64_t tokens = 0;              // M
  const int64_t* rows = nullptr;   // (M): which row of x and of every y each token is, or null: all of them in order
};

struct Int8Kernels;  // kernels/dispatch.h

// Whole-numbered levels (2^b) and their unit: as they are if they are whole and within 255, else rounded to int8.
float whole_levels(const float* levels, int count, int32_t* out);

// Rounds `count` values to int8 with one scale, which is returned: quantize() of plugins/int8.py.
float round_row(const float* values, int64_t count, int8_t* out);

// Whether levels of this range fit unsigned tables of the kernels.
bool needs_signed(const int32_t* levels, int count, const Int8Kernels& kernels);

PlaneTable prepare_table(const int32_t* levels, int bits, bool is_signed);

// Bytes that int8_linear needs beside its arguments.
int64_t int8_workspace(const Int8Args* args, int64_t count);

// The products of `count` arguments at once. `workspace` is aligned to 64.
Status int8_linear(const Int8Args* args, int64_t count, uint8_t* workspace, const Int8Kernels& kernels,
                   const Parallel& parallel);

}  // namespace rankbook
