#include "check_groups.h"

#include <cmath>
#include <cstdio>
#include <vector>

using namespace rankbook;

namespace {

constexpr int64_t kGroups = 2;
constexpr int64_t kGroup = 16;

// Numbers of both signs, many of them equal, drawn by a fixed rule.
std::vector<float> numbers(int64_t count, uint32_t state) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<float>(static_cast<int32_t>(state >> 24) - 128) / 16.0F;
  }
  return out;
}

struct Results {
  std::vector<uint8_t> codes, ranks;
  std::vector<float> decoded, place, sums, mass, value, work, errors;
  std::vector<uint16_t> narrow;
  bool operator==(const Results& other) const {
    return codes == other.codes && ranks == other.ranks && decoded == other.decoded && place == other.place &&
           sums == other.sums && mass == other.mass && value == other.value && errors == other.errors &&
           narrow == other.narrow;
  }
};

Results run(const GroupKernels& kernels, int64_t rows, int64_t levels) {
  const GroupShape shape{kGroups, kGroup, rows, levels};
  const int64_t weights = kGroups * kGroup * rows;
  const std::vector<float> values = numbers(weights, 1), books = numbers(kGroups * levels * rows, 2);
  const std::vector<float> flow = numbers(weights, 3), energy = numbers(kGroups * kGroup, 4);
  std::vector<float> move = numbers(kGroups * rows, 5);
  for (float& one : move) one = std::fabs(one);
  const size_t all = static_cast<size_t>(weights);
  const size_t of_levels = books.size();
  Results found{std::vector<uint8_t>(all), std::vector<uint8_t>(all / kGroups), std::vector<float>(all), values,
                std::vector<float>(of_levels), std::vector<float>(of_levels), std::vector<float>(of_levels),
                numbers(kGroup * rows, 6), std::vector<float>(all / kGroups), std::vector<uint16_t>(all)};
  for (int64_t index = 0; index < kGroups; ++index) {
    kernels.round({shape, values.data(), books.data(), found.codes.data(), found.narrow.data(), 1}, index);
    kernels.round({shape, values.data(), books.data(), found.codes.data(), found.decoded.data(), 0}, index);
    kernels.step({shape, flow.data(), found.codes.data(), move.data(), found.place.data(), found.sums.data(), 0}, index);
    kernels.moments({shape, values.data(), energy.data(), found.codes.data(), found.mass.data(), found.value.data()}, index);
  }
  // Any numbers do as codebooks and boundaries here: what is compared are the instruction sets.
  const std::vector<float> bounds = numbers(kGroups * (levels - 1) * rows, 7);
  std::vector<float> factor = numbers(kGroup * kGroup, 8);
  for (int64_t i = 0; i < kGroup; ++i) factor[static_cast<size_t>(i * kGroup + i)] = 1.5F;
  std::vector<int64_t> groups(kGroup);
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = static_cast<int64_t>(i) % kGroups;
  kernels.feedback({kGroup, rows, levels, found.work.data(), books.data(), bounds.data(), groups.data(), factor.data(), kGroup,
                    found.ranks.data(), found.errors.data()},
                   0, rows);
  return found;
}

// Every decoded value is an entry of its codebook by its code, and none is nearer.
bool is_nearest(const Results& found, int64_t rows, int64_t levels) {
  const std::vector<float> values = numbers(kGroups * kGroup * rows, 1), books = numbers(kGroups * levels * rows, 2);
  for (int64_t at = 0; at < kGroups * kGroup * rows; ++at) {
    const float* book = books.data() + at / (kGroup * rows) * levels * rows + at % rows;
    const size_t place = static_cast<size_t>(at);
    if (found.decoded[place] != book[found.codes[place] * rows]) return false;
    for (int64_t i = 0; i < levels; ++i) {
      if (std::fabs(book[i * rows] - values[place]) < std::fabs(found.decoded[place] - values[place])) return false;
    }
  }
  return true;
}

}  // namespace

int check_groups(const GroupKernels& kernels) {
  int failures = 0;
  for (const int64_t rows : {1, 7, 16, 33, 64}) {
    for (const int64_t levels : {4, 8, 16}) {
      const Results found = run(kernels, rows, levels);
      if (found == run(*kPortableSet.groups, rows, levels) && is_nearest(found, rows, levels)) continue;
      std::fprintf(stderr, "%s: groups of %ld rows and %ld levels differ\n", kernels.name, static_cast<long>(rows),
                   static_cast<long>(levels));
      ++failures;
    }
  }
  return failures;
}
