// The fiber scheduler and the number formats of the emulation.
#include "emulation/simt.h"

#include <cfenv>
#include <limits>

namespace rankbook::emulation {

void fail(const std::string& message) { throw std::runtime_error(message); }

Machine& Machine::get() {
  static Machine machine;
  return machine;
}

void Machine::check(const void* address, std::size_t bytes, std::size_t alignment, bool write) const {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const std::string who = " by thread " + std::to_string(thread) + " of block " + std::to_string(block_x) + ", " +
                          std::to_string(block_y);
  if (at % alignment != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes" + who);
  if (!written_.empty() && !fibers_.empty() && !fibers_[thread]->waited) {
    for (std::size_t i = 0; i < bytes; i += 2) {
      if (written_.count((at + i) / 2) > 0) fail("access to what an earlier kernel may still write" + who);
    }
  }
  if (write) {
    for (std::size_t i = 0; i < bytes; i += 2) writes_.insert((at + i) / 2);
  }
  for (const Buffer& buffer : buffers) {
    if (at < buffer.begin || at + bytes > buffer.end) continue;
    if (write && !buffer.writable) fail("write to a read-only buffer" + who);
    return;
  }
  fail(std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes outside all buffers" + who);
}

// Exceptions must not cross the switch to another stack: a fiber that fails leaves its message and ends.
void Machine::entry() {
  Machine& machine = get();
  const int self = machine.thread;
  try {
    machine.body_(machine.arguments_);
    if (machine.early_ && !machine.fibers_[self]->waited) {
      fail("a thread of a kernel that was launched early ended without waiting for earlier ones");
    }
  } catch (const std::exception& error) {
    if (machine.error_.empty()) machine.error_ = error.what();
  }
  machine.fibers_[self]->done = true;
  swapcontext(&machine.fibers_[self]->context, &machine.scheduler_);
}

void Machine::arrive(Meeting& meeting, std::uint64_t generation, const char* place) {
  if (meeting.generation != generation) {
    meeting.generation = generation;
    meeting.place = place;
    meeting.arrived = 0;
  }
  if (std::strcmp(meeting.place, place) != 0) {
    fail(std::string("threads that must meet went to different places: ") + meeting.place + " and " + place);
  }
  ++meeting.arrived;
}

const Meeting& Machine::meet_warp(const char* place, const void* data, std::size_t bytes) {
  Fiber& fiber = *fibers_[thread];
  const std::uint64_t generation = fiber.warp_generation++;
  Meeting& meeting = warps_[2 * (thread / kWarp) + generation % 2];
  arrive(meeting, generation, place);
  if (bytes > 0) std::memcpy(meeting.slots[thread % kWarp], data, bytes);
  fiber.waits_for = &meeting;
  fiber.members = kWarp;
  if (meeting.arrived < kWarp) swapcontext(&fiber.context, &scheduler_);
  fiber.waits_for = nullptr;
  return meeting;
}

void Machine::meet_block(const char* place) {
  Fiber& fiber = *fibers_[thread];
  const std::uint64_t generation = fiber.block_generation++;
  Meeting& meeting = block_[generation % 2];
  const int members = static_cast<int>(fibers_.size());
  arrive(meeting, generation, place);
  fiber.waits_for = &meeting;
  fiber.members = members;
  if (meeting.arrived < members) swapcontext(&fiber.context, &scheduler_);
  fiber.waits_for = nullptr;
}

void Machine::start_copy(unsigned to, const void* from, bool inside) {
  if (to % 16 != 0 || to + 16 > shared_bytes) fail("an asynchronous copy to a misaligned place, or outside the shared memory");
  fibers_[thread]->started.push_back({to, from, inside});
}

void Machine::commit_copies() {
  Fiber& fiber = *fibers_[thread];
  fiber.committed.push_back(std::move(fiber.started));
  fiber.started.clear();
}

void Machine::finish_copies(std::size_t pending) {
  auto& committed = fibers_[thread]->committed;
  for (; committed.size() > pending; committed.pop_front()) {
    for (const Copy& copy : committed.front()) {
      if (copy.inside) std::memcpy(shared + copy.to, copy.from, 16);
      else std::memset(shared + copy.to, 0, 16);
    }
  }
}

void Machine::run_block(int threads) {
  fibers_.resize(threads);
  warps_.assign(2 * ((threads + kWarp - 1) / kWarp), Meeting{});
  block_[0] = block_[1] = Meeting{};
  for (auto& fiber : fibers_) {
    if (!fiber) fiber = std::make_unique<Fiber>();
    fiber->done = false;
    fiber->waited = !early_;
    fiber->warp_generation = fiber->block_generation = 0;
    fiber->waits_for = nullptr;
    fiber->started.clear();
    fiber->committed.clear();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, &Machine::entry, 0);
  }
  int running = threads;
  while (running > 0) {
    bool moved = false;
    for (int i = 0; i < threads && error_.empty(); ++i) {
      Fiber& fiber = *fibers_[i];
      if (fiber.done || (fiber.waits_for != nullptr && fiber.waits_for->arrived < fiber.members)) continue;
      moved = true;
      thread = i;
      swapcontext(&scheduler_, &fiber.context);
      if (fiber.done) --running;
    }
    if (!error_.empty()) return;
    if (!moved) {
      error_ = "only a part of the threads arrived at a meeting point; the others have ended or wait elsewhere";
      return;
    }
  }
}

void Machine::run(void (*body)(const void*), const void* arguments, dim3 new_grid, std::size_t bytes_of_shared,
                  int threads, cuda::Start how) {
  early_ = how == cuda::Start::kEarly;
  if (early_ && !follows_) fail("a kernel is launched early behind none");
  if (early_) written_.insert(writes_.begin(), writes_.end());
  else written_.clear();
  writes_.clear();
  follows_ = true;
  ++launches;
  shared_bytes = bytes_of_shared;
  std::vector<unsigned char> storage(shared_bytes + 2 * kGuard + 128);
  const auto start = reinterpret_cast<std::uintptr_t>(storage.data()) + kGuard;
  shared = reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
  body_ = body;
  arguments_ = arguments;
  grid = new_grid;
  for (block_y = 0; block_y < grid.y; ++block_y) {
    for (block_x = 0; block_x < grid.x; ++block_x) {
      std::memset(storage.data(), 0xff, storage.size());  // NaN in every format
      error_.clear();
      run_block(threads);
      for (std::size_t i = 0; i < kGuard && error_.empty(); ++i) {
        if (shared[shared_bytes + i % kGuard] != 0xff || *(shared - 1 - i) != 0xff) {
          error_ = "write outside the shared memory of a block";
        }
      }
      if (!error_.empty()) fail(error_);
    }
  }
}

float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) {
    value = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
  return bits & 0x8000 ? -value : value;
}

std::uint16_t float_to_half(double value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  if (magnitude == 0.0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  const int scale = exponent - 1 < -14 ? -24 : exponent - 11;
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -scale)));  // ties to even
  // Adding instead of joining the fields carries a mantissa that rounds up to 2048 into the exponent.
  if (scale == -24) return static_cast<std::uint16_t>(sign + units);
  return static_cast<std::uint16_t>(sign + ((exponent + 14) << 10) + (units - 1024));
}

float bfloat_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

std::uint16_t float_to_bfloat(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace rankbook::emulation
