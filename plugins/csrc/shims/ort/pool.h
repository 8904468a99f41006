#pragma once

// The thread pool of a session, as kernels take it.

#include "kernels/cpu/packed/codebook.h"
#include "shims/ort/api.h"

namespace rankbook::ort {

// ParallelFor without batches (0): ONNX Runtime shares the tasks out to whichever thread is free.
inline void run_tasks(void* pool, int64_t count, void (*task)(void*, int64_t), void* argument) {
  struct Tasks {
    void (*task)(void*, int64_t);
    void* argument;
  } tasks{task, argument};
  const auto one = [](void* data, size_t index) {
    const Tasks& all = *static_cast<const Tasks*>(data);
    all.task(all.argument, static_cast<int64_t>(index));
  };
  static_cast<const Ort::KernelContext*>(pool)->ParallelFor(one, static_cast<size_t>(count), 0, &tasks);
}

inline Parallel pool_of(const Ort::KernelContext& context) { return {const_cast<Ort::KernelContext*>(&context), run_tasks}; }

}  // namespace rankbook::ort
