// Products of activations with weights: every weight is read from memory once, whatever the number of rows.
//
// XLA's libraries put the weights of a product in order before they multiply, at every call, which takes as long as the
// product itself where there are few rows. Here they lie in that order from the start: a weight [I, O] is stored as
// panels [ceil(O / 64), I, 64] of 64 outputs each, padded with zeros. A panel is the work of one thread, in whose cache it
// stays while rows are multiplied, and which fetches its next one meanwhile.
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
  wide.resize(count);
  for (int64_t i = 0; i < count; i += kLanes) store(&wide[i], load(panel + i));
  return wide.data();
}

// x [T, I] times a weight in panels.
template <typename W>
void multiply(ffi::ThreadPool& pool, const Sizes& s, const float* x, const void* w, float* out) {
  const int64_t panels = (s.outputs + kPanel - 1) / kPanel, size = s.inputs * kPanel, threads = pool.num_threads();
  const int64_t near = std::max<int64_t>(kNear / (s.inputs * sizeof(float)) / kRows, 4) * kRows;
  const int64_t chunks = (s.rows + near - 1) / near;
  parallel(pool, chunks * panels, [&](int64_t task) {
    const int64_t nth = task % panels, chunk = task / panels, o = nth * kPanel;
    const int64_t first = s.rows * chunk / chunks, width = std::min<int64_t>(kPanel, s.outputs - o);
    const Sizes own{s.rows * (chunk + 1) / chunks - first, s.inputs, s.outputs};
    const W* panel = static_cast<const W*>(w) + nth * size;
    const char* next = nth + threads < panels ? reinterpret_cast<const char*>(panel + threads * size) : nullptr;
    const int64_t bytes = size * sizeof(W);
    const float* from = x + first * s.inputs;
    float* to = out + first * s.outputs + o;
    if (own.rows < kWidened) {
      multiply_panel(own, from, panel, to, width, next, bytes);
    } else {
      multiply_panel(own, from, as_floats(panel, size), to, width, next, bytes);
    }
  });
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> out) {
  const auto in = x.dimensions(), weight = w.dimensions(), result = out->dimensions();
  if (in.size() != 2 || result.size() != 2 || result[0] != in[0]) {
    return ffi::Error::InvalidArgument("astraea_product: x is [T, I], and the result [T, O]");
  }
  const Sizes s{in[0], in[1], result[1]};
  if (weight.size() != 3 || weight[0] != (s.outputs + kPanel - 1) / kPanel || weight[1] != s.inputs ||
      weight[2] != kPanel) {
    return ffi::Error::InvalidArgument("astraea_product: weights are panels [ceil(O / 64), I, 64]");
  }
  const float* from = x.typed_data();
  float* to = out->typed_data();
  switch (w.element_type()) {
    case ffi::F32:
      multiply<float>(pool, s, from, w.untyped_data(), to);
      break;
    case ffi::U16:
      multiply<Bfloat16>(pool, s, from, w.untyped_data(), to);
      break;
    case ffi::S8:
      multiply<int8_t>(pool, s, from, w.untyped_data(), to);
      break;
    default:
      return ffi::Error::InvalidArgument("astraea_product: weights are float32, bits of bfloat16 or int8");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace astraea

XLA_FFI_DEFINE_HANDLER_SYMBOL(Product, astraea::product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
