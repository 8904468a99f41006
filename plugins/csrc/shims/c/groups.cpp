// Kernels on weights in groups (kernels/cpu/groups/groups.h) in C, for calibration/fitting/native.py, which fills the same
// structures. Functions return null, or a sentence that says what is wrong; each works on the groups [first, last).
#include <cstdint>

#include "kernels/cpu/dispatch.h"

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace rankbook;

// The processor is asked once, for every limit: asking leaves a virtual machine, which takes longer than a small layer.
const GroupKernels* kernels() {
  constexpr int kCount = static_cast<int>(Isa::kBest) + 1;
  struct Known {
    const GroupKernels* best[kCount];
    Known() {
      for (int i = 0; i < kCount; ++i) best[i] = select_kernels(static_cast<Isa>(i)).groups;
    }
  };
  static const Known known;
  Isa limit = Isa::kPortable;
  return read_limit(limit) ? known.best[static_cast<int>(limit)] : nullptr;
}

constexpr const char* kIsa = "RANKBOOK_NATIVE_ISA names no instruction set";
constexpr const char* kShape = "sizes must be positive, with 4, 8 or 16 levels";

bool has_levels(int64_t levels) { return levels == 4 || levels == 8 || levels == 16; }

template <class Groups>
const char* run(const Groups& of, void (*GroupKernels::*work)(const Groups&, int64_t), int64_t first, int64_t last) {
  const GroupShape& shape = of.shape;
  const bool inside = first >= 0 && last <= shape.groups && shape.group > 0 && shape.rows > 0;
  if (!inside || !has_levels(shape.levels)) return kShape;
  const GroupKernels* all = kernels();
  if (all == nullptr) return kIsa;
  for (int64_t index = first; index < last; ++index) (all->*work)(of, index);
  return nullptr;
}

}  // namespace

RB_EXPORT const char* rankbook_groups_round(const RoundGroups* of, int64_t first, int64_t last) {
  return run(*of, &GroupKernels::round, first, last);
}

RB_EXPORT const char* rankbook_groups_step(const StepGroups* of, int64_t first, int64_t last) {
  return run(*of, &GroupKernels::step, first, last);
}

RB_EXPORT const char* rankbook_groups_moments(const MomentGroups* of, int64_t first, int64_t last) {
  return run(*of, &GroupKernels::moments, first, last);
}

// Of rows [first, last) of the matrix; the pointers are those of all rows.
RB_EXPORT const char* rankbook_groups_feedback(const FeedbackColumns* of, int64_t first, int64_t last) {
  const bool inside = first >= 0 && last <= of->rows && of->columns > 0 && of->columns <= kFeedbackColumns;
  if (!inside || !has_levels(of->levels)) return kShape;
  const GroupKernels* all = kernels();
  if (all == nullptr) return kIsa;
  all->feedback(*of, first, last);
  return nullptr;
}
