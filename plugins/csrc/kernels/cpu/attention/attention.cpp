// Drives the inner loops of attention: the cache, which rows and keys, on which thread. Two paths. A few rows of queries read
// the keys as they lie, once; more rows read them from panels, transposed once for all rows of a head.

#include "kernels/cpu/attention/attention.h"

#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/simd/half.h"

namespace rankbook {
namespace {

// Transposing reads and writes the keys of a head once more: worth it when the tiles of that head read them four times
// or more often, 48 rows in tiles of up to 12.
constexpr int64_t kPanelRows = 48;          // rows of queries of a head from which transposing its keys pays
constexpr int64_t kSerialWork = 1 << 18;    // multiply-adds below which waking threads costs more than it gains
constexpr int64_t kSerialFew = 1 << 15;     // the same where few rows wait for keys and values from memory
constexpr int64_t kVector = 16;             // rows of tiles are whole vectors of every instruction set
constexpr float kLog2E = 1.44269504F;

struct Job {
  const AttentionArgs& args;
  const AttentionKernels& kernels;
  int64_t group;   // query heads that share keys and values
  int64_t blocks;  // of kKeyBlock positions in `present`
  int64_t panels;  // of keys, of one head
  int64_t tiles;   // of rows of queries, of one head
  int64_t row;     // bytes of a position of a head in the cache
};

// A head of the cache is contiguous, (positions, size): what one task reads is one stream.
struct Head {
  int64_t row;     // of the batch
  int64_t head;    // of keys and values
  int64_t before;  // keys before the first new one
  int64_t index() const { return row * heads + head; }
  int64_t heads;
};

bool is_prompt(const AttentionArgs& args) { return args.tokens == args.total; }

bool few_rows(const AttentionArgs& args) { return args.tokens * (args.heads / args.kv_heads) < kPanelRows; }

int64_t panels_of(const AttentionArgs& args) { return few_rows(args) ? 0 : ceil_div(args.total, kKeyPanel); }

Head head_of(const AttentionArgs& args, int64_t index) {
  const int64_t row = index / args.kv_heads;
  const int64_t before = is_prompt(args) ? 0 : args.last[row] + 1 - args.tokens;
  return {row, index % args.kv_heads, before, args.kv_heads};
}

void run(const Parallel& parallel, int64_t count, bool worth, void (*task)(void*, int64_t), Job& job) {
  if (count > 1 && worth && parallel.run != nullptr) {
    parallel.run(parallel.pool, count, task, &job);
    return;
  }
  for (int64_t index = 0; index < count; ++index) task(&job, index);
}

// By position_ids and not by counting: ONNX Runtime's node counts on from the first of them in a prompt, a difference
// that the README names.
const float* angles(const AttentionArgs& args, const float* table, int64_t row, int64_t token) {
  if (args.positions == 0) return nullptr;
  return table + args.position_ids[row * args.tokens + token] * (args.size / 2);
}

// Brings positions [from, to) of one head's buffer up to date: the past, what is new, and nothing behind it.
// Where the past's buffer is the present's nothing is copied, and a step costs one position; else the whole cache once,
// as ONNX Runtime's node does.
void append_part(const Job& job, const Head& at, int64_t from, int64_t to, const void* past, const float* fresh, bool embedded,
                 void* present) {
  const AttentionArgs& args = job.args;
  const int64_t size = args.size;
  const int64_t end = at.before + args.tokens;
  const char* old = static_cast<const char*>(past) + at.index() * args.past * job.row;
  char* buffer = static_cast<char*>(present) + at.index() * args.present * job.row;
  if (present != past && from < at.before) {
    const int64_t stop = to < at.before ? to : at.before;
    std::memcpy(buffer + from * job.row, old + from * job.row, static_cast<size_t>((stop - from) * job.row));
  }
  const int64_t first = from > at.before ? from : at.before;
  for (int64_t position = first; position < to && position < end; ++position) {
    const int64_t token = position - at.before;
    const float* x = fresh + ((at.row * args.tokens + token) * args.kv_heads + at.head) * size;
    alignas(64) float turned[kLargestHead];
    if (embedded) {
      const float* cos = angles(args, args.cos, at.row, token);
      job.kernels.embed(x, cos, angles(args, args.sin, at.row, token), size, 1.0F, turned);
      x = turned;
    }
    char* out = buffer + position * job.row;
    if (args.half) {
      job.kernels.narrow(x, size, reinterpret_cast<uint16_t*>(out));
    } else {
      std::memcpy(out, x, static_cast<size_t>(job.row));
    }
  }
  const int64_t behind = from > end ? from : end;
  if (present != past && behind < to) {
    std::memset(buffer + behind * job.row, 0, static_cast<size_t>((to - behind) * job.row));
  }
}

void append(const Job& job, const Head& at, int64_t from, int64_t to) {
  const AttentionArgs& args = job.args;
  append_part(job, at, from, to, args.past_key, args.key, args.positions > 0, args.present_key);
  append_part(job, at, from, to, args.past_value, args.value, false, args.present_value);
}

// Writes the result of one tile: rows [first, first + rows) of a head, token by token.
// Rows of a tile are tokens and, within a token, the query heads that share the keys: neighbours see nearly the same
// keys.
void attend_tile(const Job& job, const Head& at, int64_t first, int64_t rows, const float* panels) {
  const AttentionArgs& args = job.args;
  const int64_t stride = ceil_div(args.size, kVector) * kVector;
  const float scale = args.softcap > 0.0F ? args.scale / args.softcap : args.scale * kLog2E;
  alignas(64) float q[kTileRows * kLargestHead];
  alignas(64) float out[kTileRows * kLargestHead];
  int64_t begin[kTileRows];
  int64_t end[kTileRows];
  int64_t places[kTileRows];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = (first + row) / job.group;
    const int64_t head = at.head * job.group + (first + row) % job.group;
    places[row] = ((at.row * args.tokens + token) * args.heads + head) * args.size;
    const float* cos = angles(args, args.cos, at.row, token);
    const float* sin = angles(args, args.sin, at.row, token);
    job.kernels.embed(args.query + places[row], cos, sin, args.size, scale, q + row * stride);
    end[row] = at.before + token + 1;
    begin[row] = args.window > 0 && args.window < end[row] ? end[row] - args.window : 0;
  }
  const int64_t buffer = at.index() * args.present * job.row;
  const float cap = args.softcap * kLog2E;
  const char* keys = static_cast<const char*>(args.present_key) + buffer;
  const char* values = static_cast<const char*>(args.present_value) + buffer;
  job.kernels.attend({rows, args.size, stride, q, out, begin, end, cap, args.half, keys, values, panels});
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(args.output + places[row], out + row * stride, static_cast<size_t>(args.size) * sizeof(float));
  }
}

// Everything of one head of keys and values.
// A decode step: a head is one task, as its keys should come from memory once.
void head_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const Head at = head_of(job.args, index);
  append(job, at, 0, job.args.present);
  const int64_t all = job.args.tokens * job.group;
  for (int64_t first = 0; first < all; first += job.kernels.rows) {
    attend_tile(job, at, first, all - first < job.kernels.rows ? all - first : job.kernels.rows, nullptr);
  }
}

// One block of positions of one head: the cache, and the keys transposed into panels.
// A prompt, first half: with panels transposed by all threads, before any tile reads them.
void block_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const AttentionArgs& args = job.args;
  const Head at = head_of(args, index / job.blocks);
  const int64_t from = index % job.blocks * kKeyBlock;
  const int64_t to = args.present - from < kKeyBlock ? args.present : from + kKeyBlock;
  append(job, at, from, to);
  const char* keys = static_cast<const char*>(args.present_key) + at.index() * args.present * job.row;
  float* panels = args.workspace + at.index() * job.panels * kKeyPanel * args.size;
  const int64_t end = at.before + args.tokens;
  for (int64_t panel = from / kKeyPanel; panel < job.panels && panel * kKeyPanel < to; ++panel) {
    float* out = panels + panel * kKeyPanel * args.size;
    const int64_t first = panel * kKeyPanel;
    const int64_t count = end - first < kKeyPanel ? end - first : kKeyPanel;
    if (count < kKeyPanel) std::memset(out, 0, static_cast<size_t>(kKeyPanel * args.size) * sizeof(float));
    for (int64_t lane = 0; lane < count; ++lane) {
      const char* key = keys + (first + lane) * job.row;
      if (args.half) {
        const auto* stored = reinterpret_cast<const uint16_t*>(key);
        for (int64_t d = 0; d < args.size; ++d) out[d * kKeyPanel + lane] = half_to_float(stored[d]);
      } else {
        const auto* stored = reinterpret_cast<const float*>(key);
        for (int64_t d = 0; d < args.size; ++d) out[d * kKeyPanel + lane] = stored[d];
      }
    }
  }
}

// One tile of rows of one head; the last ones, which see most keys, come first.
// The longest tasks first leave short ones to fill the end, when threads run out of work.
void tile_task(void* argument, int64_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const AttentionArgs& args = job.args;
  const int64_t heads = args.batch * args.kv_heads;
  const Head at = head_of(args, index % heads);
  const int64_t first = (job.tiles - 1 - index / heads) * job.kernels.rows;
  const int64_t all = args.tokens * job.group;
  const float* panels = args.workspace + at.index() * job.panels * kKeyPanel * args.size;
  attend_tile(job, at, first, all - first < job.kernels.rows ? all - first : job.kernels.rows, panels);
}

// Every length is checked against the buffers before anything is written, since `last` is data and not a shape.
Status check(const AttentionArgs& args) {
  if (args.batch < 0 || args.tokens < 0 || args.heads <= 0 || args.kv_heads <= 0 || args.heads % args.kv_heads != 0) {
    return refusal::kLengths;
  }
  if (args.size <= 0 || args.size % kHeadStep != 0 || args.size > kLargestHead) return refusal::kHead;
  if (args.total < args.tokens || args.total > args.present || args.past > args.present) return refusal::kLengths;
  if (args.batch > 1 && args.tokens > 1 && !is_prompt(args)) return refusal::kLengths;
  const int64_t least = is_prompt(args) ? 1 : args.tokens;  // padding of a prompt is new too
  for (int64_t row = 0; row < args.batch; ++row) {
    const int64_t keys = int64_t{args.last[row]} + 1;
    if (keys < least || keys > args.total) return refusal::kLengths;
    if (!is_prompt(args) && keys - args.tokens > args.past) return refusal::kLengths;
  }
  for (int64_t i = 0; args.positions > 0 && i < args.batch * args.tokens; ++i) {
    if (args.position_ids[i] < 0 || args.position_ids[i] >= args.positions) return refusal::kPosition;
  }
  return {};
}

}  // namespace

int64_t attention_workspace(const AttentionArgs& args) {
  return args.batch * args.kv_heads * panels_of(args) * kKeyPanel * args.size;
}

Status attention(const AttentionArgs& args, const AttentionKernels& kernels, const Parallel& parallel) {
  const Status status = check(args);
  if (!status.ok()) return status;
  const int64_t group = args.heads / args.kv_heads;
  const int64_t tiles = ceil_div(args.tokens * group, kernels.rows);
  Job job{args, kernels, group, ceil_div(args.present, kKeyBlock), panels_of(args), tiles,
          args.size * static_cast<int64_t>(args.half ? sizeof(uint16_t) : sizeof(float))};
  const int64_t heads = args.batch * args.kv_heads;
  const int64_t work = args.batch * args.tokens * args.heads * args.size * args.total;
  if (few_rows(args)) {
    run(parallel, heads, work >= kSerialFew, head_task, job);
  } else {
    run(parallel, heads * job.blocks, work >= kSerialWork, block_task, job);
    run(parallel, heads * job.tiles, work >= kSerialWork, tile_task, job);
  }
  return {};
}

}  // namespace rankbook
