// Ragged paged attention of one layer, and what comes before it: norms, rotation, keys and values into their pages.
//
// Queries are cut into units, a unit's context into chunks of a fixed length, and what comes of the chunks is joined in
// their order. Units that are large beside the rest are given to several threads by chunks, the others are one piece of
// work each. Either way the same numbers are added in the same order, so that a result depends neither on the other
// rows of the step nor on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lone.h"
#include "rotation.h"
#include "threads.h"
#include "tile.h"

namespace astraea {
namespace {

constexpr int64_t kNumbersAtOnce = 8192;      // that a thread rotates and writes at least
constexpr int64_t kSmall = int64_t{1} << 16;  // multiplications with keys that are not worth waking another thread

// A chunk of a unit, or all of them.
struct Piece {
  int64_t unit;
  int64_t chunk;  // -1: all
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Piece> pieces;
  std::vector<int64_t> parts;  // by unit: where the states of its chunks lie, if it is divided; then their total
  int64_t work = 0;
};

int64_t chunk_tokens(const Unit& unit) { return unit.lone ? kLoneChunk : kTileChunk; }
int64_t first_chunk(const Unit& unit) { return unit.begin / chunk_tokens(unit); }
int64_t chunks(const Unit& unit) {
  return (unit.end + chunk_tokens(unit) - 1) / chunk_tokens(unit) - first_chunk(unit);
}

// The work of a unit: its queries times the context that they read, in multiples of a head's dimensions.
int64_t work(const Attention& a, const Unit& unit) { return unit.count * a.group * (unit.end - unit.begin) * a.dim; }

int64_t state_size(const Attention& a, const Unit& unit) { return State::size(unit.count * a.group, a.padded_dim()); }

// Units of the first key/value head, those with the most work first.
std::vector<Unit> cut(const Attention& a) {
  std::vector<Unit> units;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t start = a.starts[row], count = a.starts[row + 1] - start;
    const int64_t most = tile_queries(a.group);
    for (int64_t i = 0; i < count; i += most) {
      const int64_t here = std::min(most, count - i), position = a.kv_lens[row] - count + i;
      const int64_t begin = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
      units.push_back({row, 0, start + i, here, position, begin, position + here, count == 1});
    }
  }
  std::stable_sort(units.begin(), units.end(),
                   [&](const Unit& one, const Unit& other) { return work(a, one) > work(a, other); });
  return units;
}

Plan plan(const Attention& a, int64_t threads) {
  Plan plan;
  for (const Unit& unit : cut(a)) {
    for (int64_t head = 0; head < a.heads; ++head) {
      plan.units.push_back(unit);
      plan.units.back().head = head;
    }
    plan.work += work(a, unit) * a.heads;
  }
  const bool divisible = threads > 1 && plan.work > kSmall;
  int64_t size = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(plan.units.size()); ++i) {
    const Unit& unit = plan.units[i];
    const int64_t count = chunks(unit);
    plan.parts.push_back(size);
    if (divisible && count > 1 && work(a, unit) * threads * 4 > plan.work) {
      for (int64_t chunk = 0; chunk < count; ++chunk) plan.pieces.push_back({i, chunk});
      size += count * state_size(a, unit);
    } else {
      plan.pieces.push_back({i, -1});
    }
  }
  plan.parts.push_back(size);
  return plan;
}

// Attends to one chunk of a unit's context.
template <typename Kernel>
void attend_chunk(Kernel& kernel, const Unit& unit, int64_t chunk, State& to) {
  const int64_t length = chunk_tokens(unit), at = (first_chunk(unit) + chunk) * length;
  kernel.attend(std::max(at, unit.begin), std::min(at + length, unit.end), to);
}

// One call: the plan, and the states of divided units.
template <typename T>
class Call {
 public:
  Call(const Attention& a, int64_t threads)
      : a_(a),
        threads_(threads),
        plan_(plan(a, threads)),
        states_(new float[plan_.parts.back()]),
        left_(new std::atomic<int64_t>[plan_.units.size()]) {
    for (size_t i = 0; i < plan_.units.size(); ++i) left_[i] = chunks(plan_.units[i]);
  }

  void run(ffi::ThreadPool& pool) {
    const int64_t tokens = a_.starts[a_.rows];
    std::fill(a_.query(tokens, 0, 0), a_.query(a_.tokens, 0, 0), 0.0f);
    const int64_t some = std::max<int64_t>(1, kNumbersAtOnce / (a_.heads * (a_.group + 2) * a_.dim));
    parallel(pool, a_.tokens, (tokens + some - 1) / some, [&](int64_t i) {
      Scratch scratch(a_.dim);
      float* key = scratch.take(a_.dim);
      const int64_t end = std::min(tokens, (i + 1) * some);
      for (int64_t token = i * some; token < end; ++token) rotate_and_write<T>(a_, token, key);
    });
    const int64_t pieces = plan_.pieces.size(), at_once = pieces >= 8 * threads_ * a_.heads ? a_.heads : 1;
    const auto run_some = [&](int64_t i) {
      const int64_t end = std::min(pieces, (i + 1) * at_once);
      for (int64_t piece = i * at_once; piece < end; ++piece) run(piece);
    };
    const int64_t count = (pieces + at_once - 1) / at_once;
    if (plan_.work > kSmall) {
      parallel(pool, a_.tokens, count, run_some);
    } else {
      for (int64_t i = 0; i < count; ++i) run_some(i);
    }
  }

 private:
  void run(int64_t index) {
    const Piece& piece = plan_.pieces[index];
    const Unit& unit = plan_.units[piece.unit];
    const int64_t size = state_size(a_, unit);
    if (unit.lone) {
      Scratch scratch(2 * size + Lone<T>::scratch(a_));
      const int64_t next = std::min<int64_t>(index + 1, plan_.pieces.size() - 1);
      Lone<T> kernel(a_, unit, plan_.units[plan_.pieces[next].unit], scratch);
      attend(piece, kernel, scratch);
    } else {
      Scratch scratch(2 * size + Tile<T>::scratch(a_, unit.count));
      Tile<T> kernel(a_, unit, scratch);
      attend(piece, kernel, scratch);
    }
  }

  template <typename Kernel>
  void attend(const Piece& piece, Kernel& kernel, Scratch& scratch) {
    const Unit& unit = plan_.units[piece.unit];
    const int64_t rows = unit.count * a_.group, dim = a_.padded_dim(), size = State::size(rows, dim);
    State state(scratch.take(size), rows, dim), next(scratch.take(size), rows, dim);
    const int64_t count = chunks(unit);
    const float* sinks = a_.sinks ? a_.sinks + unit.head * a_.group : nullptr;
    if (piece.chunk < 0) {
      state.start(sinks, a_.group);
      for (int64_t chunk = 0; chunk < count; ++chunk) {
        attend_chunk(kernel, unit, chunk, next);
        state.join(next);
      }
      state.finish(a_, unit);
      return;
    }
    float* parts = states_.get() + plan_.parts[piece.unit];
    State part(parts + piece.chunk * size, rows, dim);
    attend_chunk(kernel, unit, piece.chunk, part);
    if (left_[piece.unit].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    state.start(sinks, a_.group);  // the last one joins all
    for (int64_t chunk = 0; chunk < count; ++chunk) state.join(State(parts + chunk * size, rows, dim));
    state.finish(a_, unit);
  }

  const Attention& a_;
  const int64_t threads_;
  const Plan plan_;
  const std::unique_ptr<float[]> states_;
  const std::unique_ptr<std::atomic<int64_t>[]> left_;  // by unit: chunks that are not done
};

using Floats = ffi::Buffer<ffi::F32>;
using Whole = ffi::Buffer<ffi::S32>;

// What is wrong with the numbers of a step, which say where in memory to read and write; empty if nothing is.
std::string fault(const Attention& a) {
  if (a.starts[0] != 0) return "the first row does not start with the first token";
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t start = a.starts[row], end = a.starts[row + 1], context = a.kv_lens[row];
    if (end < start || end > a.tokens) return "rows do not follow each other within the tokens";
    if (end == start) continue;
    if (context < end - start) return "a context is shorter than its tokens";
    if (context > a.width * a.page_size) return "a context is longer than its pages";
    const int64_t seen = a.window ? std::max<int64_t>(0, context - (end - start) - a.window + 1) : 0;
    for (int64_t i = seen / a.page_size; i * a.page_size < context; ++i) {
      const int64_t page = a.page_table[row * a.width + i];
      if (page < 0 || page >= a.num_pages) return "a context has a page that is not there";
    }
    for (int64_t t = start; t < end; ++t) {
      if (a.slots[t] < 0 || a.slots[t] >= a.num_pages * a.page_size) return "a token has a slot that is not there";
    }
  }
  return "";
}

template <typename Array>
bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  const auto has = array.dimensions();
  return std::equal(has.begin(), has.end(), shape.begin(), shape.end());
}

ffi::Error attention(ffi::ThreadPool pool, Floats qkv, Floats cos, Floats sin, Floats q_norm, Floats k_norm,
                     Floats sinks, Whole page_table, Whole kv_lens, Whole starts, Whole slots, ffi::AnyBuffer pages,
                     ffi::Result<Floats> out, ffi::Result<ffi::AnyBuffer> kept, float eps, float scale, float soft_cap,
                     int64_t window) {
  const auto q = qkv.dimensions(), p = pages.dimensions(), table = page_table.dimensions();
  if (q.size() != 4 || p.size() != 5 || table.size() != 2 || q[2] < 3 || q[3] % 2) {
    return ffi::Error::InvalidArgument("astraea_attention: qkv is [T, K, G + 2, H], pages are [P, 2, K, S, H]");
  }
  Attention a{};
  a.tokens = q[0], a.heads = q[1], a.group = q[2] - 2, a.dim = q[3];
  a.rows = table[0], a.width = table[1], a.num_pages = p[0], a.page_size = p[3];
  const int64_t norm = q_norm.element_count() ? a.dim : 0, sunk = sinks.element_count() ? a.heads * a.group : 0;
  if (!has_shape(pages, {a.num_pages, 2, a.heads, a.page_size, a.dim}) || !has_shape(cos, {a.tokens, a.dim / 2}) ||
      !has_shape(sin, {a.tokens, a.dim / 2}) || !has_shape(q_norm, {norm}) || !has_shape(k_norm, {norm}) ||
      !has_shape(sinks, {sunk}) || !has_shape(kv_lens, {a.rows}) || !has_shape(starts, {a.rows + 1}) ||
      !has_shape(slots, {a.tokens}) || !has_shape(*out, {a.tokens, a.heads * a.group, a.dim}) ||
      kept->untyped_data() != pages.untyped_data()) {
    return ffi::Error::InvalidArgument("astraea_attention: the arrays do not fit each other");
  }
  a.qkv = qkv.typed_data(), a.cos = cos.typed_data(), a.sin = sin.typed_data();
  a.q_norm = norm ? q_norm.typed_data() : nullptr, a.k_norm = norm ? k_norm.typed_data() : nullptr;
  a.sinks = sunk ? sinks.typed_data() : nullptr;
  a.page_table = page_table.typed_data(), a.kv_lens = kv_lens.typed_data();
  a.starts = starts.typed_data(), a.slots = slots.typed_data();
  a.pages = kept->untyped_data(), a.out = out->typed_data();
  a.eps = eps, a.scale = scale, a.soft_cap = soft_cap, a.window = window;
  if (const std::string what = fault(a); !what.empty()) {
    return ffi::Error::InvalidArgument("astraea_attention: " + what);
  }
  const int64_t threads = pool.num_threads();
  switch (pages.element_type()) {
    case ffi::F32:
      Call<float>(a, threads).run(pool);
      break;
    case ffi::U16:
      Call<Bfloat16>(a, threads).run(pool);
      break;
    case ffi::U8:
      Call<Float8>(a, threads).run(pool);
      break;
    default:
      return ffi::Error::InvalidArgument("astraea_attention: pages are float32, or bits of bfloat16 or float8");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace astraea

XLA_FFI_DEFINE_HANDLER_SYMBOL(Attention, astraea::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Floats>()
                                  .Arg<astraea::Whole>()
                                  .Arg<astraea::Whole>()
                                  .Arg<astraea::Whole>()
                                  .Arg<astraea::Whole>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<astraea::Floats>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window"));
