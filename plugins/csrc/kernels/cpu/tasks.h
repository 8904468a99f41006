#pragma once

// The tasks of several products in one row, so that threads meet once for all of them: the experts of a mixture have a few
// tokens each.

#include "kernels/cpu/packed/codebook.h"

namespace rankbook {

// Runs task(job, index) for each index below tasks(job) of each job, in this order where there is one thread.
// `work` is that of all of them; below `least` waking threads costs more than it gains. A job's `first` is set to the number
// of tasks before its own.
template <class Job>
void run_jobs(const Parallel& parallel, Job* jobs, int64_t count, int64_t work, int64_t least, int64_t (*tasks)(const Job&),
              void (*task)(Job&, int64_t)) {
  struct All {
    Job* jobs;
    int64_t count;
    void (*task)(Job&, int64_t);
  } all{jobs, count, task};
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    jobs[i].first = total;
    total += tasks(jobs[i]);
  }
  // The last job whose first task is not behind the index: those without tasks have the first of the next.
  const auto one = [](void* argument, int64_t index) {
    const All& of = *static_cast<const All*>(argument);
    int64_t low = 0;
    for (int64_t high = of.count; high - low > 1;) {
      const int64_t middle = (low + high) / 2;
      (of.jobs[middle].first <= index ? low : high) = middle;
    }
    of.task(of.jobs[low], index - of.jobs[low].first);
  };
  if (total > 1 && work >= least && parallel.run != nullptr) {
    parallel.run(parallel.pool, total, one, &all);
    return;
  }
  for (int64_t index = 0; index < total; ++index) one(&all, index);
}

inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Takes memory from a workspace, or counts what would be taken where there is none.
class Cutter {
 public:
  explicit Cutter(uint8_t* from) : from_(from) {}
  template <class T>
  T* take(int64_t count) {
    T* const at = from_ == nullptr ? nullptr : reinterpret_cast<T*>(from_ + size_);
    size_ += aligned(count * static_cast<int64_t>(sizeof(T)));
    return at;
  }
  int64_t size() const { return size_; }

 private:
  uint8_t* from_;
  int64_t size_ = 0;
};

}  // namespace rankbook
