// Copies of constants on pages of 2 MB, and the way back for the pages of the file that they were copied from. Linux
// only; elsewhere every copy is empty, and the loops read the file's own pages.
//
// Chunks of 64 MB are shared by all nodes of all sessions, a copy holds its chunk. Called by Product::copy, in the
// order in which a token reads.
#include "shims/ort/huge_pages.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rankbook::ort {

#if defined(__linux__)

namespace {

// Why copy at all: a token reads every weight once, and with pages of 4 KB the processor walks its page tables once for
// every 4 KB read, which costs a third of the bandwidth.
constexpr size_t kHuge = size_t{1} << 21;
constexpr size_t kChunk = size_t{64} << 20;  // layers share chunks: small ones would waste most of a page, chunks their ends
constexpr size_t kPiece = size_t{4} << 20;   // copied at a time, so that little is held twice meanwhile
constexpr size_t kLine = 64;

// For rankbook_native_info() alone.
std::atomic<int64_t> held{0};

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// With [never] the copies would cost memory and bring nothing.
bool system_has_huge_pages() {
  static const bool has = [] {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string text;
    return static_cast<bool>(std::getline(file, text)) && text.find("[never]") == std::string::npos;
  }();
  return has;
}

// Whether the system can read all these pages again: they are a file's, and nobody has written to them. What it says about
// a page is in proc_pid_pagemap(5).
// Without that check MADV_DONTNEED would turn pages that ONNX Runtime has written, e.g. constants that it has cast,
// into zeros.
bool lie_in_file(uintptr_t first, uintptr_t last, uintptr_t page) {
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kFile = uint64_t{1} << 61;
  // 8 bytes for each page of 4 KB: 8 KB for a piece of 4 MB.
  std::vector<uint64_t> pages((last - first) / page);
  // Readable by the process itself; without the right to see physical addresses the flags are there all the same.
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return false;
  const size_t wanted = pages.size() * sizeof(uint64_t);
  const ssize_t got = pread(map, pages.data(), wanted, static_cast<off_t>(first / page * sizeof(uint64_t)));
  close(map);
  if (got != static_cast<ssize_t>(wanted)) return false;
  bool any = false;
  for (const uint64_t entry : pages) {
    if ((entry & kSwapped) != 0 || ((entry & kPresent) != 0 && (entry & kFile) == 0)) return false;
    any = any || (entry & kPresent) != 0;
  }
  return any;
}

}  // namespace

class HugeChunk {
 public:
  // One huge page more than asked for, because mmap aligns to 4 KB. MADV_HUGEPAGE is advice: where no huge page is
  // free, small ones come, and the loops are slower, not wrong.
  explicit HugeChunk(size_t size) : size_(round_up(size, kHuge)) {
    void* mapped = mmap(nullptr, size_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return;
    mapped_ = static_cast<uint8_t*>(mapped);
    begin_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(mapped_), kHuge));
    madvise(begin_, size_, MADV_HUGEPAGE);
  }
  ~HugeChunk() {
    if (mapped_ != nullptr) munmap(mapped_, size_ + kHuge);
  }
  HugeChunk(const HugeChunk&) = delete;
  HugeChunk& operator=(const HugeChunk&) = delete;

  // A bump of a pointer: copies live about as long as their session, all together.
  void* take(size_t bytes) {
    const size_t wanted = round_up(bytes, kLine);
    // The next chunk begins; what is left of this one stays unused, and no memory is behind it.
    if (mapped_ == nullptr || used_ + wanted > size_) return nullptr;
    void* taken = begin_ + used_;
    used_ += wanted;
    held += static_cast<int64_t>(wanted);
    return taken;
  }

  // Gives the whole pages of what was taken back to the system; their place is not used again.
  // A session that ends while others live leaves holes; they cost addresses, not memory.
  static void drop(void* taken, size_t bytes) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = round_up(reinterpret_cast<uintptr_t>(taken), page);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(taken) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    held -= static_cast<int64_t>(round_up(bytes, kLine));
  }

 private:
  size_t size_;
  size_t used_ = 0;
  uint8_t* mapped_ = nullptr;
  uint8_t* begin_ = nullptr;
};

// Whole pages around the bytes, neighbours included: they are read again from the file if somebody needs them.
void drop_mapped(const void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t last = round_up(reinterpret_cast<uintptr_t>(data) + bytes, page);
  // The file stays in the page cache, where the next session finds it.
  if (bytes != 0 && lie_in_file(first, last, page)) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// An empty copy, and the caller reads where the constant is: where there are no huge pages, or no memory.
HugeCopy HugeCopy::of(const void* data, size_t bytes) {
  // Sessions may be created side by side; only the bump of the pointer is locked, the copying is not.
  static std::mutex mutex;
  static std::weak_ptr<HugeChunk> current;
  HugeCopy copy;
  if (bytes == 0 || !system_has_huge_pages()) return copy;
  std::shared_ptr<HugeChunk> chunk;
  void* to = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    chunk = current.lock();
    if (chunk != nullptr) to = chunk->take(bytes);
    if (to == nullptr) {
      chunk = std::make_shared<HugeChunk>(bytes > kChunk ? bytes : kChunk);
      to = chunk->take(bytes);
      current = chunk;
    }
  }
  if (to == nullptr) return {};
  // A chunk lives as long as one of its copies; the pages of each end with it.
  copy.chunk_ = std::shared_ptr<HugeChunk>(chunk.get(), [chunk, to, bytes](HugeChunk*) { HugeChunk::drop(to, bytes); });
  // Piece by piece, each given back at once: peak memory is that of one copy and 4 MB.
  for (size_t at = 0; at < bytes; at += kPiece) {
    const auto* from = static_cast<const uint8_t*>(data) + at;
    const size_t size = bytes - at < kPiece ? bytes - at : kPiece;
    std::memcpy(static_cast<uint8_t*>(to) + at, from, size);
    drop_mapped(from, size);
  }
  copy.data_ = to;
  return copy;
}

int64_t huge_bytes() { return held; }

#else

class HugeChunk {};

HugeCopy HugeCopy::of(const void*, size_t) { return {}; }

void drop_mapped(const void*, size_t) {}

int64_t huge_bytes() { return 0; }

#endif

}  // namespace rankbook::ort
