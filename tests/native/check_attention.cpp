#include "check_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/cpu/simd/half.h"

namespace {

using namespace rankbook;
using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;

// By halves a rounding may go the other way where an embedded key lies near the middle: a step of a key of up to 2 in a
// score of up to 80 elements. Otherwise sums of elements of up to 1 in another order.
constexpr double kTolerance = 2e-6;
constexpr double kHalfTolerance = 2e-3;

struct Case {
  std::vector<int32_t> keys;  // of each row of the batch
  int64_t tokens, past, heads, kv_heads, size, window;
  float softcap;
  bool rotary;
};

const Case kCases[] = {
    {{1}, 1, 0, 3, 3, 8, -1, 0.0F, false},      {{70}, 1, 69, 9, 3, 16, -1, 0.0F, true},
    {{140}, 1, 150, 14, 1, 24, 9, 2.0F, false}, {{40}, 3, 37, 4, 2, 48, 7, 0.0F, true},
    {{150}, 20, 130, 6, 2, 16, -1, 0.0F, true}, {{33}, 33, 0, 6, 2, 40, 12, 0.0F, false},
    {{34, 5}, 34, 40, 4, 2, 16, -1, 1.5F, true}, {{65, 2, 30}, 1, 64, 2, 1, 80, -1, 0.0F, true},
    {{700}, 1, 700, 6, 2, 64, -1, 0.0F, false},  // enough work for threads
    {{2100, 40}, 1, 2100, 4, 2, 16, 300, 1.5F, false},  // many blocks, most of them hidden
};

constexpr int64_t kPositions = 160;
constexpr float kScale = 0.3F;

// The inputs of one call on the heap, and what each output must be.
struct Call {
  const Case& c;
  AttentionArgs args;
  Floats query, key, value, past_key, past_value, cos, sin, present_key, present_value, output, workspace;
  Halves half_past_key, half_past_value, half_present_key, half_present_value;
  std::vector<int32_t> last;
  std::vector<int64_t> position_ids;
  std::mt19937 source{7};

  Floats draw(int64_t count) {
    Floats out(static_cast<size_t>(count));
    for (float& value_ : out) value_ = std::uniform_real_distribution<float>(-1.0F, 1.0F)(source);
    return out;
  }

  // What a cache of 16-bit floats holds of each element; the elements then are these.
  static Halves halved(Floats& from) {
    Halves out(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
      out[i] = nearest_half(from[i]);
      from[i] = half_to_float(out[i]);
    }
    return out;
  }

  Call(const Case& c_, bool in_place, bool half = false) : c(c_) {
    args.half = half;
    args.batch = static_cast<int64_t>(c.keys.size());
    args.tokens = c.tokens;
    args.heads = c.heads;
    args.kv_heads = c.kv_heads;
    args.size = c.size;
    args.past = c.past;
    args.total = *std::max_element(c.keys.begin(), c.keys.end());
    args.present = std::max(args.total, c.past);
    args.scale = kScale;
    args.softcap = c.softcap;
    args.window = c.window;
    query = draw(args.batch * c.tokens * c.heads * c.size);
    key = draw(args.batch * c.tokens * c.kv_heads * c.size);
    value = draw(static_cast<int64_t>(key.size()));
    past_key = draw(args.batch * c.kv_heads * c.past * c.size);
    past_value = draw(static_cast<int64_t>(past_key.size()));
    if (half) {
      half_past_key = halved(past_key);
      half_past_value = halved(past_value);
    }
    cos = draw(kPositions * c.size / 2);
    sin = draw(kPositions * c.size / 2);
    for (int64_t row = 0; row < args.batch; ++row) {
      last.push_back(c.keys[static_cast<size_t>(row)] - 1);
      for (int64_t token = 0; token < c.tokens; ++token) position_ids.push_back(before(row) + token);
    }
    output.assign(query.size(), NAN);
    present_key.assign(static_cast<size_t>(args.batch * c.kv_heads * args.present * c.size), NAN);
    present_value = present_key;
    workspace.assign(static_cast<size_t>(attention_workspace(args)), NAN);
    half_present_key.assign(half ? present_key.size() : 0, 0x7E00);  // not a number
    half_present_value = half_present_key;
    if (in_place) {
      present_key = past_key;
      present_value = past_value;
      half_present_key = half_past_key;
      half_present_value = half_past_value;
    }
    bind(in_place);
  }

  void bind(bool in_place) {
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.present_key = stored(present_key, half_present_key);
    args.present_value = stored(present_value, half_present_value);
    args.past_key = in_place ? args.present_key : stored(past_key, half_past_key);
    args.past_value = in_place ? args.present_value : stored(past_value, half_past_value);
    args.last = last.data();
    args.output = output.data();
    args.workspace = workspace.data();
    if (!c.rotary) return;
    args.positions = kPositions;
    args.cos = cos.data();
    args.sin = sin.data();
    args.position_ids = position_ids.data();
  }

  void* stored(Floats& floats, Halves& halves) {
    return args.half ? static_cast<void*>(halves.data()) : static_cast<void*>(floats.data());
  }

  double present(size_t at) const { return args.half ? half_to_float(half_present_key[at]) : present_key[at]; }

  int64_t before(int64_t row) const { return c.tokens == args.total ? 0 : c.keys[static_cast<size_t>(row)] - c.tokens; }

  // A head of one new token after the rotary embedding.
  std::vector<double> embedded(const float* x, int64_t row, int64_t token) const {
    std::vector<double> out(x, x + c.size);
    const int64_t half = c.size / 2;
    const int64_t at = (before(row) + token) * half;
    for (int64_t i = 0; c.rotary && i < half; ++i) {
      const double angle_cos = cos[static_cast<size_t>(at + i)];
      const double angle_sin = sin[static_cast<size_t>(at + i)];
      out[static_cast<size_t>(i)] = x[i] * angle_cos - x[half + i] * angle_sin;
      out[static_cast<size_t>(half + i)] = x[half + i] * angle_cos + x[i] * angle_sin;
    }
    return out;
  }

  // One position of the cache of a head: from the past, or new.
  std::vector<double> cached(const Floats& past, const Floats& fresh, bool embed, int64_t row, int64_t head,
                             int64_t position) const {
    if (position < before(row)) {
      const float* x = past.data() + ((row * c.kv_heads + head) * c.past + position) * c.size;
      return {x, x + c.size};
    }
    const int64_t token = position - before(row);
    const float* x = fresh.data() + ((row * c.tokens + token) * c.kv_heads + head) * c.size;
    std::vector<double> out = embed ? embedded(x, row, token) : std::vector<double>(x, x + c.size);
    for (double& element : out) {
      if (args.half) element = half_to_float(nearest_half(static_cast<float>(element)));
    }
    return out;
  }

  std::vector<double> attended(int64_t row, int64_t token, int64_t head) const {
    const int64_t shared = head / (c.heads / c.kv_heads);
    const int64_t end = before(row) + token + 1;
    const int64_t begin = c.window > 0 ? std::max<int64_t>(0, end - c.window) : 0;
    const std::vector<double> q = embedded(query.data() + ((row * c.tokens + token) * c.heads + head) * c.size, row, token);
    std::vector<double> out(static_cast<size_t>(c.size));
    double total = 0.0;
    for (int64_t position = begin; position < end; ++position) {
      const std::vector<double> k = cached(past_key, key, true, row, shared, position);
      const std::vector<double> v = cached(past_value, value, false, row, shared, position);
      double score = 0.0;
      for (size_t i = 0; i < q.size(); ++i) score += q[i] * k[i] * kScale;
      if (c.softcap > 0.0F) score = c.softcap * std::tanh(score / c.softcap);
      const double weight = std::exp(score);
      total += weight;
      for (size_t i = 0; i < v.size(); ++i) out[i] += weight * v[i];
    }
    for (double& number : out) number /= total;
    return out;
  }

  double error() const {
    double worst = 0.0;
    for (int64_t row = 0; row < args.batch; ++row) {
      for (int64_t token = 0; token < c.tokens; ++token) {
        for (int64_t head = 0; head < c.heads; ++head) {
          const std::vector<double> want = attended(row, token, head);
          const float* got = output.data() + ((row * c.tokens + token) * c.heads + head) * c.size;
          for (size_t i = 0; i < want.size(); ++i) worst = std::fmax(worst, distance(got[i], want[i]));
        }
      }
      for (int64_t place = 0; place < c.kv_heads * (before(row) + c.tokens); ++place) {
        const int64_t head = place / (before(row) + c.tokens);
        const int64_t position = place % (before(row) + c.tokens);
        const std::vector<double> want = cached(past_key, key, true, row, head, position);
        const int64_t at = ((row * c.kv_heads + head) * args.present + position) * c.size;
        for (size_t i = 0; i < want.size(); ++i) worst = std::fmax(worst, distance(present(static_cast<size_t>(at) + i), want[i]));
      }
    }
    return worst;
  }

  static double distance(double got, double want) { return std::isnan(got) ? INFINITY : std::fabs(got - want); }
};

// Every 16-bit float comes back from fp32, and what lies between two goes to the nearer, in the middle to the even one.
int check_halves(const AttentionKernels& kernels) {
  int failures = 0;
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const auto next = static_cast<uint16_t>(bits + 1);  // infinity behind the last
    const float low = half_to_float(half);
    const float high = bits + 1 < 0x7C00 ? half_to_float(next) : 65536.0F;
    const float middle = low + (high - low) / 2;  // exact
    const float x[] = {low, -low, middle, std::nextafter(middle, low), std::nextafter(middle, high), -middle, low, low};
    const uint16_t even = bits % 2 == 0 ? half : next;
    const uint16_t want[] = {half, static_cast<uint16_t>(half | 0x8000), even, half, next, static_cast<uint16_t>(even | 0x8000),
                             half, half};
    uint16_t got[8];
    kernels.narrow(x, 8, got);
    for (int i = 0; i < 8; ++i) failures += got[i] == want[i] && nearest_half(x[i]) == want[i] ? 0 : 1;
  }
  const float special[] = {INFINITY, -INFINITY, 65519.0F, 1e30F, 0.0F, 0.0F, 0.0F, NAN};
  uint16_t got[8];
  kernels.narrow(special, 8, got);
  const uint16_t want[] = {0x7C00, 0xFC00, 0x7BFF, 0x7C00, 0, 0, 0};
  for (int i = 0; i < 7; ++i) failures += got[i] == want[i] && nearest_half(special[i]) == want[i] ? 0 : 1;
  failures += std::isnan(half_to_float(got[7])) && std::isnan(half_to_float(nearest_half(NAN))) ? 0 : 1;
  if (failures > 0) std::fprintf(stderr, "attention, %s: %d roundings to halves differ\n", kernels.name, failures);
  return failures;
}

}  // namespace

int check_attention(const rankbook::AttentionKernels& kernels, const rankbook::Parallel& parallel) {
  int failures = 0;
  for (const Case& c : kCases) {
    for (const int form : {0, 1, 2, 3}) {
      const bool in_place = form % 2 == 1;
      const bool half = form >= 2;
      Call call(c, in_place, half);
      if (in_place && call.args.past < call.args.total) continue;
      const Status status = attention(call.args, kernels, parallel);
      const double error = status.ok() ? call.error() : INFINITY;
      if (error < (half ? kHalfTolerance : kTolerance)) continue;
      std::fprintf(stderr, "attention, %s%s: %ld tokens, %ld keys, heads of %ld: error %g\n", kernels.name,
                   half ? ", a cache of halves" : "", static_cast<long>(c.tokens), static_cast<long>(call.args.total),
                   static_cast<long>(c.size), error);
      ++failures;
    }
  }
  failures += check_halves(kernels);
  Call call(kCases[1], false);
  call.position_ids[0] = kPositions;
  failures += attention(call.args, kernels, parallel) == rankbook::refusal::kPosition ? 0 : 1;
  call.position_ids[0] = 0;
  call.last[0] = 70;
  failures += attention(call.args, kernels, parallel) == rankbook::refusal::kLengths ? 0 : 1;
  return failures;
}
