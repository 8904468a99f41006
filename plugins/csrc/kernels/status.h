#pragma once

namespace rankbook {

// What a kernel answers. Kernels never throw, print or allocate; the shim of each runtime turns these into its errors.
enum class Status { kOk, kBadShape, kUnsupported, kBadIndex };

}  // namespace rankbook
