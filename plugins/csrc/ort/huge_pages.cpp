#include "ort/huge_pages.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rankbook::ort {

#if defined(__linux__)

namespace {

constexpr size_t kHuge = size_t{1} << 21;
constexpr size_t kChunk = size_t{16} << 20;  // layers share chunks, small ones would waste most of a page
constexpr size_t kLine = 64;

std::atomic<int64_t> held{0};

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

bool system_has_huge_pages() {
  static const bool has = [] {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string text;
    return static_cast<bool>(std::getline(file, text)) && text.find("[never]") == std::string::npos;
  }();
  return has;
}

// Whether an address lies in a mapped file: only then can its pages be dropped and read again.
bool in_a_file(uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (std::getline(maps, line)) {
    std::istringstream fields(line);
    uintptr_t begin = 0;
    uintptr_t end = 0;
    char dash = 0;
    std::string permissions, offset, device;
    uint64_t inode = 0;
    fields >> std::hex >> begin >> dash >> end >> permissions >> offset >> device >> std::dec >> inode;
    if (address >= begin && address < end) return inode != 0;
  }
  return false;
}

void give_back(const void* data, size_t bytes) {
#if defined(MADV_PAGEOUT)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + bytes) / page * page;
  // A hint: where the system does not follow it, memory is held twice and nothing else changes.
  if (last > first && in_a_file(begin)) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace

class HugeChunk {
 public:
  explicit HugeChunk(size_t size) : size_(round_up(size, kHuge)) {
    void* mapped = mmap(nullptr, size_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return;
    mapped_ = static_cast<uint8_t*>(mapped);
    begin_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(mapped_), kHuge));
    madvise(begin_, size_, MADV_HUGEPAGE);
  }
  ~HugeChunk() {
    if (mapped_ != nullptr) munmap(mapped_, size_ + kHuge);
    held -= static_cast<int64_t>(used_);
  }
  HugeChunk(const HugeChunk&) = delete;
  HugeChunk& operator=(const HugeChunk&) = delete;

  void* take(size_t bytes) {
    const size_t wanted = round_up(bytes, kLine);
    if (mapped_ == nullptr || used_ + wanted > size_) return nullptr;
    void* taken = begin_ + used_;
    used_ += wanted;
    held += static_cast<int64_t>(wanted);
    return taken;
  }

 private:
  size_t size_;
  size_t used_ = 0;
  uint8_t* mapped_ = nullptr;
  uint8_t* begin_ = nullptr;
};

HugeCopy HugeCopy::of(const void* data, size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<HugeChunk> current;
  HugeCopy copy;
  if (bytes == 0 || !system_has_huge_pages()) return copy;
  void* to = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    copy.chunk_ = current.lock();
    if (copy.chunk_ != nullptr) to = copy.chunk_->take(bytes);
    if (to == nullptr) {
      copy.chunk_ = std::make_shared<HugeChunk>(bytes > kChunk ? bytes : kChunk);
      to = copy.chunk_->take(bytes);
      current = copy.chunk_;
    }
  }
  if (to == nullptr) return {};
  std::memcpy(to, data, bytes);
  give_back(data, bytes);
  copy.data_ = to;
  return copy;
}

int64_t huge_bytes() { return held; }

#else

class HugeChunk {};

HugeCopy HugeCopy::of(const void*, size_t) { return {}; }

int64_t huge_bytes() { return 0; }

#endif

}  // namespace rankbook::ort
