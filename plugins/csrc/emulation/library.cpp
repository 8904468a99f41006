// A C interface over the emulated kernels, for the tests (ctypes), and broken kernels that the checks must catch.
#include <cstring>
#include <utility>

#include "kernels/cuda/dispatch.cuh"
#include "kernels/cuda/experts.cuh"
#include "kernels/cuda/int8.cuh"
#include "kernels/cuda/launch.h"

using rankbook::cuda::Status;
using rankbook::emulation::Machine;

namespace {

std::string last_error;

template <typename Call>
int guarded(Call call) {
  try {
    const Status status = call();
    last_error = status.ok() ? "" : status.message;
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return last_error.empty() ? 0 : 1;
}

struct Probe {
  int what;
  float* y;
};

void broken(Probe probe) {
  using namespace rankbook::cuda;
  if (probe.what == 0 && thread_index() == 3) return;  // one thread never comes to the barrier
  if (probe.what == 1 && thread_index() < 16) {        // half a warp shuffles
    store(probe.y, shuffle_xor(1.0f, 1));
    return;
  }
  if (probe.what == 2) store(probe.y + thread_index(), 1.0f);  // more threads than elements
  if (probe.what == 3) shared_memory()[64 + thread_index() % 2] = 0;
  if (probe.what == 4) {
    if (thread_index() % 2 == 0) {
      barrier();
    } else {
      barrier();
    }
  }
  if (probe.what == 5) copy_async(64, probe.y, true);  // behind the 64 bytes that there are
  barrier();
}

// The first of two writes; the second reads before it has waited (6), or where one thread never waits (7), or as it should (8).
void early(Probe probe) {
  using namespace rankbook::cuda;
  if (probe.what == 6) store(probe.y + 1, load(probe.y));
  if (probe.what == 7 && thread_index() == 3) return;
  wait_for_earlier();
  if (thread_index() == 0) store(probe.y, load(probe.y) + 1.0f);
}

}  // namespace

#define RB_EXPORT extern "C" __attribute__((visibility("default")))

RB_EXPORT const char* rb_error() { return last_error.c_str(); }

RB_EXPORT void rb_buffers(const std::uintptr_t* begins, const std::size_t* sizes, const int* writable, int count) {
  auto& buffers = Machine::get().buffers;
  buffers.clear();
  for (int i = 0; i < count; ++i) buffers.push_back({begins[i], begins[i] + sizes[i], writable[i] != 0});
}

// Bytes of a structure that the tests mirror; 0 for another name.
RB_EXPORT std::size_t rb_size(const char* name) {
  using namespace rankbook::cuda;
  const struct {
    const char* name;
    std::size_t bytes;
  } all[] = {{"Floats", sizeof(Floats)},           {"PackedWeight", sizeof(PackedWeight)}, {"Factor", sizeof(Factor)},
             {"Matmul", sizeof(Matmul)},           {"Gather", sizeof(Gather)},             {"MatmulKernel", sizeof(MatmulKernel)},
             {"DenseKernel", sizeof(DenseKernel)}, {"PrefillKernel", sizeof(PrefillKernel)}, {"Int8Plan", sizeof(Int8Plan)},     {"Int8Kernel", sizeof(Int8Kernel)},
             {"RoundKernel", sizeof(RoundKernel)},  {"ExpertKernel", sizeof(ExpertKernel)}};
  for (const auto& each : all) {
    if (std::strcmp(each.name, name) == 0) return each.bytes;
  }
  return 0;
}

RB_EXPORT std::size_t rb_workspace(const rankbook::cuda::Matmul* arguments) {
  return rankbook::cuda::matmul_workspace(*arguments);
}

RB_EXPORT int rb_matmul(const rankbook::cuda::Matmul* arguments) {
  return guarded([&] { return rankbook::cuda::launch_matmul(*arguments, nullptr); });
}

RB_EXPORT std::size_t rb_workspace_of_several(const rankbook::cuda::Matmul* products, int count) {
  return rankbook::cuda::matmuls_workspace(products, count);
}

RB_EXPORT int rb_several(const rankbook::cuda::Matmul* products, int count) {
  return guarded([&] { return rankbook::cuda::launch_matmuls(products, count, nullptr); });
}

// Blocks that the machine runs at once; returns how many it did.
RB_EXPORT int rb_resident(int blocks) { return std::exchange(Machine::get().resident_blocks, blocks); }

// Kernels since the last call.
RB_EXPORT int rb_launches() { return std::exchange(Machine::get().launches, 0); }

RB_EXPORT int rb_gather(const rankbook::cuda::Gather* arguments) {
  return guarded([&] { return rankbook::cuda::launch_gather(*arguments, nullptr); });
}

RB_EXPORT int rb_dense(const rankbook::cuda::PackedWeight* weight, void* y, int type) {
  return guarded(
      [&] { return rankbook::cuda::launch_dense(*weight, y, static_cast<rankbook::cuda::DataType>(type), nullptr); });
}

// What begins with 6 is two kernels, of which the second starts early.
RB_EXPORT int rb_broken(int what, float* y) {
  using rankbook::cuda::Start;
  return guarded([&] {
    if (what < 6) return rankbook::cuda::launch(broken, dim3(1), 64, nullptr, Probe{what, y});
    const Status first = rankbook::cuda::launch(early, dim3(1), 64, nullptr, Probe{0, y});
    return first.ok() ? rankbook::cuda::launch(early, dim3(1), 64, nullptr, Probe{what, y}, Start::kEarly) : first;
  });
}
