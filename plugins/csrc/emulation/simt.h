// Runs the kernels on the CPU, from the same source, to prove them on a machine without a GPU.
//
// Every thread of a block is a fiber; a fiber runs until it meets its warp (shuffle, mma) or its block (barrier). What a
// GPU leaves undefined is an error here: memory outside the registered buffers, misaligned vectors, writes past the
// dynamic shared memory, warps and blocks of which only a part arrives at a meeting point, or whose threads arrive at
// different ones. Shared memory starts as NaN and so does scratch. Blocks run one after the other.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "kernels/cuda/params.h"

#define RB_DEVICE inline
#define RB_KERNEL(...) void
#define RB_KERNEL_REGISTERS(...) void

struct uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  explicit dim3(int x_, int y_ = 1) : x(x_), y(y_) {}
  int x, y;
};

namespace rankbook::emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;
constexpr std::size_t kGuard = 256;

[[noreturn]] void fail(const std::string& message);

// A buffer that kernels may touch.
struct Buffer {
  std::uintptr_t begin, end;
  bool writable;
};

// Where threads meet: complete when all members of a warp or block have arrived at the same place.
struct Meeting {
  std::uint64_t generation = ~std::uint64_t{0};
  const char* place = nullptr;
  int arrived = 0;
  alignas(16) unsigned char slots[kWarp][32];  // what each lane of a warp shows the others
};

struct Machine {
  static Machine& get();

  void run(void (*body)(const void*), const void* arguments, dim3 grid, std::size_t bytes_of_shared, int threads,
           cuda::Start start);
  void check(const void* address, std::size_t bytes, std::size_t alignment, bool write) const;

  // A kernel that is launched early may run while those before it, up to the last one that was launched in turn, still do:
  // until a thread has waited, it may touch nothing that they write. Every thread must wait.
  void wait_for_earlier() { fibers_[thread]->waited = true; }
  void end_earlier() {  // what is no kernel waits, and nothing starts early behind it
    follows_ = false;
    written_.clear();
  }

  // Meets the other lanes of the warp; `data` (at most 32 bytes) of all lanes is in the result.
  const Meeting& meet_warp(const char* place, const void* data, std::size_t bytes);
  void meet_block(const char* place);

  // Asynchronous copies to shared memory take place when the thread waits for them, not earlier: who reads without
  // waiting finds what was there before.
  void start_copy(unsigned to, const void* from, bool inside);
  void commit_copies();
  void finish_copies(std::size_t pending);

  std::vector<Buffer> buffers;
  int thread = 0, block_x = 0, block_y = 0;
  dim3 grid{1};
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  int launches = 0;  // kernels so far
  int resident_blocks = 8;  // few, so that some layers of the tests fill the machine and others are shared by blocks

 private:
  struct Copy {
    unsigned to;
    const void* from;
    bool inside;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
    bool done = false, waited = false;
    std::uint64_t warp_generation = 0, block_generation = 0;
    const Meeting* waits_for = nullptr;
    int members = 0;
    std::vector<Copy> started;
    std::deque<std::vector<Copy>> committed;
  };
  static void entry();
  void run_block(int threads);
  static void arrive(Meeting& meeting, std::uint64_t generation, const char* place);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_;  // two per warp: the next meeting may start while lanes still read the last
  Meeting block_[2];
  ucontext_t scheduler_;
  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  std::string error_;
  bool early_ = false, follows_ = false;               // how the present kernel is launched; whether it follows one
  std::unordered_set<std::uintptr_t> written_;         // by kernels that it may not see the end of, in pieces of 2 bytes
  mutable std::unordered_set<std::uintptr_t> writes_;  // its own
};

float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(double value);
float bfloat_to_float(std::uint16_t bits);
std::uint16_t float_to_bfloat(float value);

}  // namespace rankbook::emulation

namespace rankbook::cuda {

// Far below those of a GPU, so that small layers meet the limits at all.
constexpr int kMostBlocksY = 128;
constexpr std::size_t kMostDense = 8 * 1024;
constexpr int kWideBranch = 10;
constexpr int kUShareColumns = 64;

template <typename T>
T load(const T* address) {
  emulation::Machine::get().check(address, sizeof(T), sizeof(T), false);
  return *address;
}
template <typename T>
T load_fresh(const T* address) {
  return load(address);
}
inline uint4 load_codes(const uint4* address) { return load(address); }
template <typename T>
void store(T* address, T value) {
  emulation::Machine::get().check(address, sizeof(T), sizeof(T), true);
  *address = value;
}

inline int thread_index() { return emulation::Machine::get().thread; }
inline int block_x() { return emulation::Machine::get().block_x; }
inline int block_y() { return emulation::Machine::get().block_y; }
inline int grid_x() { return emulation::Machine::get().grid.x; }
inline int grid_y() { return emulation::Machine::get().grid.y; }
inline unsigned char* shared_memory() { return emulation::Machine::get().shared; }

#define RB_TEXT_(x) #x
#define RB_TEXT(x) RB_TEXT_(x)
#define RB_HERE __FILE__ ":" RB_TEXT(__LINE__)
#define barrier() emulation_barrier(RB_HERE)
inline void emulation_barrier(const char* place) { emulation::Machine::get().meet_block(place); }

inline void warp_barrier() { emulation::Machine::get().meet_warp("warp barrier", nullptr, 0); }
template <typename T>
T shuffle_xor(T value, int mask) {
  auto& machine = emulation::Machine::get();
  const emulation::Meeting& met = machine.meet_warp("shuffle", &value, sizeof value);
  T other;
  std::memcpy(&other, met.slots[(machine.thread % emulation::kWarp) ^ mask], sizeof other);
  return other;
}

inline std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = a | static_cast<std::uint64_t>(b) << 32;
  std::uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t which = selector >> (4 * i) & 15u;
    if (which > 7) emulation::fail("a byte permutation with the sign bit of a selector set");
    out |= static_cast<std::uint32_t>(bytes >> (8 * which) & 255u) << (8 * i);
  }
  return out;
}

inline std::uint32_t spread_half(std::uint32_t v, int high) { return permute(v, v, high ? 0x3232u : 0x1010u); }
inline std::uint32_t upper_half(std::uint32_t v) { return v >> 16; }
inline unsigned multiply_high(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

// Blocks run one after the other: what one wrote the next one sees.
inline void publish(float* address, float value) { store(address, value); }
inline float load_other(const float* address) { return load(address); }
inline unsigned arrive(unsigned* counter) {
  const unsigned before = load(counter);
  store(counter, before + 1);
  return before;
}
inline void see_others() {}
inline void let_next_start() {}
inline void wait_for_earlier() { emulation::Machine::get().wait_for_earlier(); }
inline void prefetch(const void* from, unsigned bytes) {
  if (bytes > 0) emulation::Machine::get().check(from, bytes, 16, false);
}
template <typename Kernel>
bool starts_early(Kernel) {
  return true;
}
struct Residency {
  template <typename Kernel>
  int blocks(Kernel, std::size_t) {
    return emulation::Machine::get().resident_blocks;
  }
};
inline Status clear(void* address, std::size_t bytes, void*) {
  emulation::Machine::get().end_earlier();
  emulation::Machine::get().check(address, bytes, 4, true);
  std::memset(address, 0, bytes);
  return {};
}

inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - emulation::Machine::get().shared);
}
template <typename... Words>
void read_shared(unsigned at, Words&... words) {
  auto& machine = emulation::Machine::get();
  if (at % (4 * sizeof...(Words)) != 0) emulation::fail("misaligned read of shared memory");
  if (at + 4 * sizeof...(Words) > machine.shared_bytes) emulation::fail("read outside the shared memory of a block");
  const unsigned char* from = machine.shared + at;
  ((std::memcpy(&words, from, 4), from += 4), ...);
}

inline unsigned kept(unsigned value) { return value; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline std::uint32_t and_xor(std::uint32_t a, std::uint32_t b, std::uint32_t c) { return (a & b) ^ c; }
inline int round_to_int(float value) { return static_cast<int>(std::nearbyint(value)); }
inline void copy_async(unsigned to, const void* from, bool inside) {
  if (inside) emulation::Machine::get().check(from, 16, 16, false);
  emulation::Machine::get().start_copy(to, from, inside);
}
inline void commit_copies() { emulation::Machine::get().commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::Machine::get().finish_copies(kPending);
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float half_to_float(std::uint16_t bits) { return emulation::half_to_float(bits); }
inline std::uint16_t float_to_half(float value) { return emulation::float_to_half(value); }
inline float bfloat_to_float(std::uint16_t bits) { return emulation::bfloat_to_float(bits); }
inline std::uint16_t float_to_bfloat(float value) { return emulation::float_to_bfloat(value); }
inline std::uint32_t pack_half(float low, float high) {
  return float_to_half(low) | static_cast<std::uint32_t>(float_to_half(high)) << 16;
}
inline std::uint32_t pack_bfloat(float low, float high) {
  return float_to_bfloat(low) | static_cast<std::uint32_t>(float_to_bfloat(high)) << 16;
}
inline float2 unpack_half(std::uint32_t v) {
  return {half_to_float(static_cast<std::uint16_t>(v)), half_to_float(static_cast<std::uint16_t>(v >> 16))};
}
inline std::uint32_t fma_half(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const float2 x = unpack_half(a), y = unpack_half(b), z = unpack_half(c);
  const double low = static_cast<double>(x.x) * y.x + z.x, high = static_cast<double>(x.y) * y.y + z.y;
  return emulation::float_to_half(low) | static_cast<std::uint32_t>(emulation::float_to_half(high)) << 16;
}

// The fragments of mma.m16n8k16, by the tables of the PTX manual: lane (g = lane / 4, t = lane % 4) holds of A rows g
// and g + 8, columns 2 t, 2 t + 1 and those plus 8; of B the same columns as rows, at column g; of C rows g and g + 8,
// columns 2 t, 2 t + 1.
template <typename Decode>
void emulated_mma(const char* place, float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  Decode decode) {
  auto& machine = emulation::Machine::get();
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulation::Meeting& met = machine.meet_warp(place, mine, sizeof mine);
  const int g = machine.thread % emulation::kWarp / 4, t = machine.thread % 4;
  const auto element = [&](int lane, int word, int half) {
    std::uint32_t bits;
    std::memcpy(&bits, met.slots[lane] + 4 * word, 4);
    return decode(static_cast<std::uint16_t>(bits >> (16 * half)));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int source = k % 8 / 2;
      sum += static_cast<double>(element(4 * (row % 8) + source, row / 8 + 2 * (k / 8), k % 2)) *
             element(4 * column + source, 4 + k / 8, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

constexpr bool kHasBFloatMma = true;
inline void mma_half(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated_mma("mma f16", c, a, b0, b1, emulation::half_to_float);
}
inline void mma_bfloat(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated_mma("mma bf16", c, a, b0, b1, emulation::bfloat_to_float);
}

// And of mma.m16n8k32 for bytes: four columns of A (rows of B) to a word instead of two.
inline void mma_int8(int (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, const int (&c)[4]) {
  auto& machine = emulation::Machine::get();
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulation::Meeting& met = machine.meet_warp("mma s8", mine, sizeof mine);
  const int g = machine.thread % emulation::kWarp / 4, t = machine.thread % 4;
  const auto element = [&](int lane, int word, int byte) {
    return static_cast<int>(static_cast<std::int8_t>(met.slots[lane][4 * word + byte]));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    d[i] = c[i];
    for (int k = 0; k < 32; ++k) {
      const int source = k % 16 / 4;
      d[i] += element(4 * (row % 8) + source, row / 8 + 2 * (k / 16), k % 4) * element(4 * column + source, 4 + k / 16, k % 4);
    }
  }
}

template <typename Arguments>
Status launch(void (*kernel)(Arguments), dim3 grid, std::size_t shared_bytes, void*, const Arguments& arguments,
              Start start = Start::kInTurn) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  constexpr std::size_t kMost = 64 * 1024;  // what every GPU since Turing has
  if (grid.x < 1 || grid.y < 1 || grid.y > kMostBlocksY) emulation::fail("a grid that no GPU takes");
  if (shared_bytes > kMost) emulation::fail("a kernel asks for more than 64 KiB of shared memory");
  emulation::Machine::get().run(
      [](const void* data) {
        const auto* it = static_cast<const Call*>(data);
        it->kernel(*it->arguments);
      },
      &call, grid, shared_bytes, kWarps * emulation::kWarp, start);
  return {};
}

}  // namespace rankbook::cuda
