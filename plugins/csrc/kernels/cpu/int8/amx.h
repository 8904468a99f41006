#pragma once

// Integer sums in the tiles of AMX: two instructions multiply up to 16 tokens with 64 inputs of 32 rows. Entries decoded for
// dot products (gemm.h) lie as a tile takes them: a row of it holds four inputs of 16 rows of the weight.

#include "kernels/cpu/int8/codes.h"

namespace rankbook {
namespace {
namespace int8_loops {

inline constexpr int64_t kUnitTokens = 16;  // rows of a tile

// The tiles of a thread. Whoever leaves them configured makes the operating system save 8 KB at every switch.
//
//   tile   holds
//   0, 1   sums of the lower and of the upper 16 rows of a panel
//   2      two blocks of inputs; 3, 4: their entries for the lower and the upper rows
//   5      one block of inputs; 6, 7: the same for it
class TileUnit {
 public:
  TileUnit() = default;
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
  ~TileUnit() {
    if (tokens_ > 0) _tile_release();
  }

  // out (tokens, 32) = the tokens of x (stride bytes apart) times `blocks` blocks of entries (8 lanes, 32 rows, 4).
  void multiply(const int8_t* x, int64_t stride, int64_t tokens, const uint8_t* entries, int64_t blocks, int32_t* out) {
    configure(tokens);
    written(x);
    written(entries);
    _tile_zero(0);
    _tile_zero(1);
    for (; blocks >= 2; blocks -= 2, x += 2 * kBlock, entries += 16 * kWordBytes) {
      _tile_loadd(2, x, stride);
      _tile_loadd(3, entries, kWordBytes);
      _tile_loadd(4, entries + kHalf, kWordBytes);
      _tile_dpbsud(0, 2, 3);
      _tile_dpbsud(1, 2, 4);
    }
    if (blocks > 0) {
      _tile_loadd(5, x, stride);
      _tile_loadd(6, entries, kWordBytes);
      _tile_loadd(7, entries + kHalf, kWordBytes);
      _tile_dpbsud(0, 5, 6);
      _tile_dpbsud(1, 5, 7);
    }
    _tile_stored(0, out, kPanel * sizeof *out);
    _tile_stored(1, out + kPanel / 2, kPanel * sizeof *out);
  }

 private:
  static constexpr int64_t kHalf = kWordBytes / 2;

  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start = 0;
    uint8_t none[14] = {};
    uint16_t bytes[16] = {};  // of a row of each tile
    uint8_t rows[16] = {};
  };

  // The instructions of GCC 12 do not say that they read memory: without this, what they read may be written too late.
  static void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

  void configure(int64_t tokens) {
    if (tokens == tokens_) return;
    tokens_ = tokens;
    Configuration shapes;
    const auto shape = [&](int tile, int64_t rows, int64_t bytes) {
      shapes.rows[tile] = static_cast<uint8_t>(rows);
      shapes.bytes[tile] = static_cast<uint16_t>(bytes);
    };
    for (const int sums : {0, 1}) shape(sums, tokens, kHalf);
    shape(2, tokens, 2 * kBlock);
    shape(5, tokens, kBlock);
    for (const int two_blocks : {3, 4}) shape(two_blocks, 16, kHalf);
    for (const int one_block : {6, 7}) shape(one_block, 8, kHalf);
    written(&shapes);
    _tile_loadconfig(&shapes);
  }

  int64_t tokens_ = 0;
};

}  // namespace int8_loops
}  // namespace
}  // namespace rankbook
