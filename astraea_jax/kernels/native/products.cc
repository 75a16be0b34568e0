// Products of activations with weights: every weight is read from memory once, whatever the number of rows.
//
// XLA's libraries put the weights of a product in order before they multiply, at every call, which takes as long as the
// product itself where there are few rows. Here they lie in that order from the start: a weight [I, O] is stored as
// panels [ceil(O / 64), I, 64] of 64 outputs each, padded with zeros. A panel is the work of one thread, in whose cache it
// stays while all rows are multiplied. A table [O, I], whose rows are looked up, too, stays as it is.
//
// A result is one sum in the order of the inputs, or, for a table, one sum for each lane of a vector. So it depends
// neither on other rows nor on their number.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace astraea {
namespace {

constexpr int kPanel = 64;  // outputs of a panel
#if defined(__AVX512F__)
constexpr int kRows = 6, kVecs = 4;  // 24 sums, 4 vectors of weights and a factor fill 32 registers
#else
constexpr int kRows = 4, kVecs = 2;  // 8 sums, 2 vectors and a factor fit into 16
#endif
constexpr int64_t kWidened = 4 * kRows;  // rows from which on narrow weights are widened once for all of them

struct Sizes {
  int64_t rows, inputs, outputs;
};

// Sums of `rows` rows and kVecs vectors of a panel.
template <int rows, typename W>
void multiply_block(const float* x, int64_t inputs, const W* panel, float* out, int64_t stride) {
  Vec sums[rows][kVecs] = {};
  for (int64_t i = 0; i < inputs; ++i, panel += kPanel) {
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
void multiply_rows(int64_t count, const float* x, int64_t inputs, const W* panel, float* out, int64_t stride) {
  if constexpr (rows > 0) {
    if (count == rows) {
      for (int o = 0; o < kPanel; o += kVecs * kLanes) multiply_block<rows>(x, inputs, panel + o, out + o, stride);
    } else {
      multiply_rows<W, rows - 1>(count, x, inputs, panel, out, stride);
    }
  }
}

// All rows times a panel, of which `width` outputs are used.
template <typename W>
void multiply_panel(const Sizes& s, const float* x, const W* panel, float* out, int64_t width) {
  for (int64_t r = 0; r < s.rows; r += kRows) {
    const int64_t count = std::min<int64_t>(kRows, s.rows - r);
    float *to = out + r * s.outputs, rest[kRows * kPanel];
    const bool whole = width == kPanel;
    multiply_rows(count, x + r * s.inputs, s.inputs, panel, whole ? to : rest, whole ? s.outputs : kPanel);
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
void multiply(ffi::ThreadPool& pool, const Sizes& s, const float* x, const W* w, float* out) {
  parallel(pool, (s.outputs + kPanel - 1) / kPanel, [&](int64_t task) {
    const int64_t size = s.inputs * kPanel, o = task * kPanel, width = std::min<int64_t>(kPanel, s.outputs - o);
    const W* panel = w + task * size;
    if (s.rows < kWidened) {
      multiply_panel(s, x, panel, out + o, width);
    } else {
      multiply_panel(s, x, as_floats(panel, size), out + o, width);
    }
  });
}

// Products of `rows` rows with `outputs` rows of a table [O, I].
template <int rows, int outputs, typename W>
void dot_block(const Sizes& s, const float* x, const W* w, float* out) {
  Vec sums[rows][outputs] = {};
  int64_t i = 0;
  for (; i + kLanes <= s.inputs; i += kLanes) {
    Vec weights[outputs];
    for (int o = 0; o < outputs; ++o) weights[o] = load(w + o * s.inputs + i);
    for (int r = 0; r < rows; ++r) {
      const Vec factors = load(x + r * s.inputs + i);
      for (int o = 0; o < outputs; ++o) sums[r][o] += factors * weights[o];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) {
      float total = sum(sums[r][o]);
      for (int64_t j = i; j < s.inputs; ++j) total += x[r * s.inputs + j] * load_one(w + o * s.inputs + j);
      out[r * s.outputs + o] = total;
    }
  }
}

template <int outputs, typename W, int rows = kRows>
void dot_rows(int64_t count, const Sizes& s, const float* x, const W* w, float* out) {
  if constexpr (rows > 0) {
    if (count == rows) {
      dot_block<rows, outputs>(s, x, w, out);
    } else {
      dot_rows<outputs, W, rows - 1>(count, s, x, w, out);
    }
  }
}

// x [T, I] times the transpose of a table [O, I].
template <typename W>
void multiply_transposed(ffi::ThreadPool& pool, const Sizes& s, const float* x, const W* w, float* out) {
  constexpr int64_t kTask = 32;  // rows of a table that stay in a thread's nearest cache
  parallel(pool, (s.outputs + kTask - 1) / kTask, [&](int64_t task) {
    const int64_t end = std::min(s.outputs, (task + 1) * kTask);
    for (int64_t r = 0; r < s.rows; r += kRows) {
      const int64_t count = std::min<int64_t>(kRows, s.rows - r);
      int64_t o = task * kTask;
      for (; o + kVecs <= end; o += kVecs) {
        dot_rows<kVecs>(count, s, x + r * s.inputs, w + o * s.inputs, out + r * s.outputs + o);
      }
      for (; o < end; ++o) dot_rows<1>(count, s, x + r * s.inputs, w + o * s.inputs, out + r * s.outputs + o);
    }
  });
}

template <typename W>
void product_of(ffi::ThreadPool& pool, const Sizes& s, const float* x, const void* w, float* out, bool panels) {
  (panels ? multiply<W> : multiply_transposed<W>)(pool, s, x, static_cast<const W*>(w), out);
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> out) {
  const auto in = x.dimensions(), weight = w.dimensions(), result = out->dimensions();
  if (in.size() != 2 || result.size() != 2 || result[0] != in[0]) {
    return ffi::Error::InvalidArgument("astraea_product: x is [T, I], and the result [T, O]");
  }
  const Sizes s{in[0], in[1], result[1]};
  const bool panels = weight.size() == 3 && weight[0] == (s.outputs + kPanel - 1) / kPanel && weight[1] == s.inputs &&
                      weight[2] == kPanel;
  if (!panels && (weight.size() != 2 || weight[0] != s.outputs || weight[1] != s.inputs)) {
    return ffi::Error::InvalidArgument("astraea_product: weights are panels [ceil(O / 64), I, 64] or a table [O, I]");
  }
  const float* from = x.typed_data();
  float* to = out->typed_data();
  switch (w.element_type()) {
    case ffi::F32:
      product_of<float>(pool, s, from, w.untyped_data(), to, panels);
      break;
    case ffi::U16:
      product_of<Bfloat16>(pool, s, from, w.untyped_data(), to, panels);
      break;
    case ffi::S8:
      product_of<int8_t>(pool, s, from, w.untyped_data(), to, panels);
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
