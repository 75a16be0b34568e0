// Products of activations with weights: every weight is read from memory once, whatever the number of rows.
//
// XLA's libraries put the weights of a product in order before they multiply, at every call, which takes as long as the
// product itself where there are few rows. Here they lie in that order from the start: a weight [I, O] is stored as
// panels [ceil(O / 64), I, 64] of 64 outputs each, padded with zeros. A panel is the work of one thread, in whose cache
// it stays while rows are multiplied, and which fetches its next one meanwhile.
//
// Every result is one sum in the order of the inputs, so it depends neither on other rows nor on their number.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace astraea {
namespace {

constexpr int kPanel = 64;  // outputs of a panel
constexpr int kLine = 64;  // bytes that are fetched at once
constexpr int64_t kNear = 256 << 10;  // bytes of activations that stay in a thread's cache beside a panel
#if defined(__AVX512F__)
constexpr int kRows = 6, kVecs = 4;  // 24 sums, 4 vectors of weights and a factor fill 32 registers
#else
constexpr int kRows = 4, kVecs = 2;  // 8 sums, 2 vectors and a factor fit into 16
#endif
constexpr int64_t kWidened = 4 * kRows;  // rows from which on narrow weights are widened once for all of them

struct Sizes {
  int64_t rows, inputs, outputs;
};

// What is fetched while a block is multiplied: so many lines for each input.
struct Ahead {
  const char* at;
  int lines;
};

// Sums of `rows` rows and kVecs vectors of a panel.
template <int rows, typename W>
void multiply_block(const float* x, int64_t inputs, const W* panel, float* out, int64_t stride, Ahead ahead) {
  Vec sums[rows][kVecs] = {};
  for (int64_t i = 0; i < inputs; ++i, panel += kPanel) {
    for (int n = 0; n < ahead.lines; ++n, ahead.at += kLine) __builtin_prefetch(ahead.at);
    Vec weights[kVecs];
    for (int v = 0; v < kVecs; ++v) weights[v] = load(panel + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(x[r * inputs + i]);
      for (int v = 0; v < kVecs; ++v) sums[r][v] += factor * weights[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(out + r * stride + v * kLanes, sums[r][v]);
  }
}

// Calls multiply_block with as many rows as there are, at most kRows.
template <typename W, int rows = kRows>
void multiply_rows(int64_t count, const float* x, int64_t inputs, const W* panel, float* out, int64_t stride,
                   Ahead ahead) {
  if constexpr (rows > 0) {
    if (count == rows) {
      for (int o = 0; o < kPanel; o += kVecs * kLanes, ahead.lines = 0) {
        multiply_block<rows>(x, inputs, panel + o, out + o, stride, ahead);
      }
    } else {
      multiply_rows<W, rows - 1>(count, x, inputs, panel, out, stride, ahead);
    }
  }
}

// Rows times a panel, of which `width` outputs are used, while the `size` bytes of the next one are fetched.
template <typename W>
void multiply_panel(const Sizes& s, const float* x, const W* panel, float* out, int64_t width, const char* next,
                    int64_t size) {
  const int64_t blocks = (s.rows + kRows - 1) / kRows, share = s.inputs * kLine;
  const int lines = next == nullptr || blocks == 1 ? 0 : (size + blocks * share - 1) / (blocks * share);
  const bool whole = width == kPanel;
  float rest[kRows * kPanel];
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r = s.rows * b / blocks, count = s.rows * (b + 1) / blocks - r, from = b * lines * share;
    float* to = out + r * s.outputs;
    multiply_rows(count, x + r * s.inputs, s.inputs, panel, whole ? to : rest, whole ? s.outputs : kPanel,
                  Ahead{next + from, from < size ? lines : 0});
    for (int64_t i = 0; !whole && i < count; ++i) {
      std::memcpy(to + i * s.outputs, rest + i * kPanel, width * sizeof(float));
    }
  }
}

const float* as_floats(const float* panel, int64_t) { return panel; }

template <typename W>
const float* as_floats(const W* panel, int64_t count) {
  thread_local std::vector<float> wide;
  if (static_cast<int64_t>(wide.size()) < count) wide.resize(count);
  for (int64_t i = 0; i < count; i += kLanes) store(&wide[i], load(panel + i));
  return wide.data();
}

// Consecutive rows that are multiplied by the same one of several matrices.
struct Run {
  int64_t first, rows, matrix;
};

// Some rows of a run times one panel: what a thread does at a time.
struct Task {
  int64_t first, rows, panel;
};

// Cuts runs into tasks. A panel follows itself while there are rows for it, so that it is read from memory once; there
// are so many rows at a time that their activations stay in a thread's cache.
std::vector<Task> cut(const std::vector<Run>& runs, int64_t inputs, int64_t panels) {
  const int64_t near = std::max<int64_t>(kNear / (inputs * sizeof(float)) / kRows, 2 * kWidened / kRows) * kRows;
  std::vector<Task> tasks;
  for (const Run& run : runs) {
    const int64_t parts = (run.rows + near - 1) / near;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = run.rows * part / parts, to = run.rows * (part + 1) / parts;
        tasks.push_back({run.first + from, to - from, run.matrix * panels + panel});
      }
    }
  }
  return tasks;
}

// Runs of rows of x [T, I] times their matrices in panels.
template <typename W>
void multiply(ffi::ThreadPool& pool, const Sizes& s, const std::vector<Run>& runs, const float* x, const W* w,
              float* out) {
  const int64_t panels = (s.outputs + kPanel - 1) / kPanel, size = s.inputs * kPanel, threads = pool.num_threads();
  const std::vector<Task> tasks = cut(runs, s.inputs, panels);
  const int64_t count = tasks.size(), bytes = size * sizeof(W);
  parallel(pool, s.rows, count, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t o = task.panel % panels * kPanel, width = std::min<int64_t>(kPanel, s.outputs - o);
    const Sizes own{task.rows, s.inputs, s.outputs};
    const W* panel = w + task.panel * size;
    const W* after = i + threads < count ? w + tasks[i + threads].panel * size : nullptr;
    const char* next = reinterpret_cast<const char*>(after);
    const float* from = x + task.first * s.inputs;
    float* to = out + task.first * s.outputs + o;
    if (own.rows < kWidened) {
      multiply_panel(own, from, panel, to, width, next, bytes);
    } else {
      multiply_panel(own, from, as_floats(panel, size), to, width, next, bytes);
    }
  });
}

using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;

// Runs of rows times weights [..., ceil(O / 64), I, 64], of any number of matrices.
ffi::Error multiply_runs(ffi::ThreadPool& pool, const Sizes& s, const std::vector<Run>& runs, const Floats& x,
                         const ffi::AnyBuffer& w, float* out) {
  const auto weight = w.dimensions();
  const size_t n = weight.size();
  if (weight[n - 3] != (s.outputs + kPanel - 1) / kPanel || weight[n - 2] != s.inputs || weight[n - 1] != kPanel) {
    return ffi::Error::InvalidArgument("products: a matrix is panels [ceil(O / 64), I, 64]");
  }
  switch (w.element_type()) {
    case ffi::F32:
      multiply(pool, s, runs, x.typed_data(), static_cast<const float*>(w.untyped_data()), out);
      break;
    case ffi::U16:
      multiply(pool, s, runs, x.typed_data(), static_cast<const Bfloat16*>(w.untyped_data()), out);
      break;
    case ffi::S8:
      multiply(pool, s, runs, x.typed_data(), static_cast<const int8_t*>(w.untyped_data()), out);
      break;
    default:
      return ffi::Error::InvalidArgument("products: weights are float32, bits of bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// Whether `used` is a number of rows of x, up to which results are asked for.
bool counts_rows(const Indices& used, int64_t rows) {
  return used.element_count() == 1 && used.typed_data()[0] >= 0 && used.typed_data()[0] <= rows;
}

// The first `used` rows times a matrix. Others become zero.
ffi::Error product(ffi::ThreadPool pool, Floats x, Indices used, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> out) {
  const auto in = x.dimensions(), result = out->dimensions();
  if (in.size() != 2 || result.size() != 2 || result[0] != in[0] || w.dimensions().size() != 3 ||
      !counts_rows(used, in[0])) {
    return ffi::Error::InvalidArgument(
        "astraea_product: x is [T, I], the weight one matrix, and the result [T, O], of which 0 to T rows are used");
  }
  const int64_t rows = used.typed_data()[0];
  const std::vector<Run> runs = {{0, rows, 0}};
  std::fill(out->typed_data() + rows * result[1], out->typed_data() + in[0] * result[1], 0.0f);
  return multiply_runs(pool, {in[0], in[1], result[1]}, runs, x, w, out->typed_data());
}

// The first `used` rows, each times the matrix of its expert; rows of an expert follow each other. Others become zero.
ffi::Error grouped_product(ffi::ThreadPool pool, Floats x, Indices experts, Indices used, ffi::AnyBuffer w,
                           ffi::ResultBuffer<ffi::F32> out) {
  const auto in = x.dimensions(), result = out->dimensions();
  if (in.size() != 2 || result.size() != 2 || result[0] != in[0] || w.dimensions().size() != 4 ||
      experts.element_count() != static_cast<size_t>(in[0]) || !counts_rows(used, in[0])) {
    return ffi::Error::InvalidArgument(
        "astraea_grouped_product: x is [B, I], the weight a matrix of each expert, the result [B, O], of which 0 to B "
        "rows are used, and every row has an expert");
  }
  const int32_t* expert = experts.typed_data();
  const int64_t rows = used.typed_data()[0], count = w.dimensions()[0];
  std::vector<Run> runs;
  for (int64_t first = 0, end; first < rows; first = end) {
    for (end = first + 1; end < rows && expert[end] == expert[first];) ++end;
    if (expert[first] < 0 || expert[first] >= count) {
      return ffi::Error::InvalidArgument("astraea_grouped_product: a row has an expert that is not there");
    }
    runs.push_back({first, end - first, expert[first]});
  }
  std::fill(out->typed_data() + rows * result[1], out->typed_data() + in[0] * result[1], 0.0f);
  return multiply_runs(pool, {in[0], in[1], result[1]}, runs, x, w, out->typed_data());
}

}  // namespace
}  // namespace astraea

XLA_FFI_DEFINE_HANDLER_SYMBOL(Product, astraea::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedProduct, astraea::grouped_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
