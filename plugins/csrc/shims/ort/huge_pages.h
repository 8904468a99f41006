#pragma once

// Copies of constants in memory with huge pages. Decoding streams all weights once per token; with pages of 4 KB the walks
// through page tables cost a third of the bandwidth (AMD Zen 5 in a virtual machine: 22 GB/s instead of 36).

#include <cstddef>
#include <cstdint>
#include <memory>

namespace rankbook::ort {

class HugeChunk;

// Read-only bytes, on a cache line; the memory lives as long as the last copy of this handle.
class HugeCopy {
 public:
  HugeCopy() = default;

  // An empty handle if the system has no huge pages: use the original then. Where the original is a mapped file, its
  // pages are given back to the system, so that the copy replaces them.
  static HugeCopy of(const void* data, size_t bytes);

  const void* data() const { return data_; }

 private:
  std::shared_ptr<HugeChunk> chunk_;
  const void* data_ = nullptr;
};

// Gives the pages of bytes that are not needed again back to the system, if they lie in a mapped file and are what the file
// says; otherwise, and where Linux does not tell, memory is held twice and nothing else changes.
void drop_mapped(const void* data, size_t bytes);

// Bytes that all handles hold at the moment.
int64_t huge_bytes();

}  // namespace rankbook::ort
