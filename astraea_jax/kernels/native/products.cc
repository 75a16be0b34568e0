// Products of activations with weights: every weight is read from memory once, whatever the number of rows.
//
// XLA's libraries put the weights of a product in order before they multiply, at every call, which takes as long as the
// product itself where there are few rows. Here outputs are cut into panels, each the work of one thread. The panel of a
// weight [I, O] is multiplied where it lies if one block of rows does it, and else first copied to where it stays in the
// thread's cache. A weight [O, I] lies as it is needed.
//
// A result is one sum in the order of the inputs, or, for [O, I], one sum for each lane of a vector. So it depends
// neither on other rows nor on their number.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace astraea {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVecs = 4;  // 24 sums, 4 vectors of weights and a factor fill 32 registers
#else
constexpr int kRows = 4, kVecs = 2;  // 8, 2 and 1 of 16
#endif
constexpr int kAhead = 12;  // rows of a weight that are fetched ahead

struct Sizes {
  int64_t rows, inputs, outputs;
};

// Sums of `rows` rows and `vecs` vectors of outputs. `stride` is the distance of two inputs' weights.
template <int rows, int vecs, typename W>
void multiply_block(const float* x, int64_t inputs, const W* w, int64_t stride, float* out, int64_t outputs) {
  Vec sums[rows][vecs] = {};
  for (int64_t i = 0; i < inputs; ++i, w += stride) {
    Vec weights[vecs];
    for (int v = 0; v < vecs; ++v) {
      weights[v] = load(w + v * kLanes);
      if (stride != vecs * kLanes) __builtin_prefetch(w + kAhead * stride + v * kLanes);
    }
    for (int r = 0; r < rows; ++r) {
      const Vec factor = broadcast(x[r * inputs + i]);
      for (int v = 0; v < vecs; ++v) sums[r][v] += factor * weights[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vecs; ++v) store(out + r * outputs + v * kLanes, sums[r][v]);
  }
}

// Calls multiply_block with as many rows as there are, at most kRows.
template <int vecs, typename W, int rows = kRows>
void multiply_rows(int64_t count, const float* x, int64_t inputs, const W* w, int64_t stride, float* out,
                   int64_t outputs) {
  if constexpr (rows > 0) {
    if (count == rows) {
      multiply_block<rows, vecs>(x, inputs, w, stride, out, outputs);
    } else {
      multiply_rows<vecs, W, rows - 1>(count, x, inputs, w, stride, out, outputs);
    }
  }
}

// All rows times a panel of `vecs` vectors of outputs of a weight [I, O].
template <int vecs, typename W>
void multiply_panel(const Sizes& s, const float* x, const W* w, float* out) {
  constexpr int64_t width = vecs * kLanes;
  if (s.rows <= kRows) {
    multiply_rows<vecs>(s.rows, x, s.inputs, w, s.outputs, out, s.outputs);
    return;
  }
  thread_local std::vector<float> panel;
  panel.resize(s.inputs * width);
  for (int64_t i = 0; i < s.inputs; ++i) {
    for (int v = 0; v < vecs; ++v) {
      const W* from = w + i * s.outputs + v * kLanes;
      __builtin_prefetch(from + kAhead * s.outputs);
      store(&panel[i * width + v * kLanes], load(from));
    }
  }
  for (int64_t r = 0; r < s.rows; r += kRows) {
    const int64_t count = std::min<int64_t>(kRows, s.rows - r);
    multiply_rows<vecs>(count, x + r * s.inputs, s.inputs, panel.data(), width, out + r * s.outputs, s.outputs);
  }
}

// The outputs that do not fill a vector.
template <typename W>
void multiply_rest(const Sizes& s, const float* x, const W* w, float* out, int64_t count) {
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t o = 0; o < count; ++o) {
      float sum = 0;
      for (int64_t i = 0; i < s.inputs; ++i) sum += x[r * s.inputs + i] * load_one(w + i * s.outputs + o);
      out[r * s.outputs + o] = sum;
    }
  }
}

// x [T, I] times w [I, O].
template <typename W>
void multiply(ffi::ThreadPool& pool, const Sizes& s, const float* x, const W* w, float* out) {
  // One row leaves registers for four times as many outputs, which are read in longer pieces.
  const int64_t wide = (s.rows == 1 ? 4 : 1) * kVecs * kLanes, threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t width = s.outputs >= 4 * threads * wide ? wide : kLanes * (s.rows == 1 ? kVecs : 2);
  parallel(pool, (s.outputs + width - 1) / width, [&](int64_t task) {
    int64_t o = task * width;
    const int64_t end = std::min(s.outputs, o + width);
    if (s.rows == 1) {
      for (; o + 4 * kVecs * kLanes <= end; o += 4 * kVecs * kLanes) multiply_panel<4 * kVecs>(s, x, w + o, out + o);
    }
    for (; o + kVecs * kLanes <= end; o += kVecs * kLanes) multiply_panel<kVecs>(s, x, w + o, out + o);
    for (; o + kLanes <= end; o += kLanes) multiply_panel<1>(s, x, w + o, out + o);
    if (o < end) multiply_rest(s, x, w + o, out + o, end - o);
  });
}

// Products of `rows` rows with `outputs` rows of a weight [O, I].
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

// x [T, I] times the transpose of w [O, I].
template <typename W>
void multiply_transposed(ffi::ThreadPool& pool, const Sizes& s, const float* x, const W* w, float* out) {
  constexpr int64_t kPanel = 32;  // rows of a weight that stay in a thread's nearest cache
  parallel(pool, (s.outputs + kPanel - 1) / kPanel, [&](int64_t task) {
    const int64_t end = std::min(s.outputs, (task + 1) * kPanel);
    for (int64_t r = 0; r < s.rows; r += kRows) {
      const int64_t count = std::min<int64_t>(kRows, s.rows - r);
      int64_t o = task * kPanel;
      for (; o + kVecs <= end; o += kVecs) {
        dot_rows<kVecs>(count, s, x + r * s.inputs, w + o * s.inputs, out + r * s.outputs + o);
      }
      for (; o < end; ++o) dot_rows<1>(count, s, x + r * s.inputs, w + o * s.inputs, out + r * s.outputs + o);
    }
  });
}

template <typename W>
void product_of(ffi::ThreadPool& pool, const Sizes& s, const float* x, const void* w, float* out, bool transposed) {
  (transposed ? multiply_transposed<W> : multiply<W>)(pool, s, x, static_cast<const W*>(w), out);
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> out,
                   bool transposed) {
  const auto in = x.dimensions(), weight = w.dimensions(), result = out->dimensions();
  if (in.size() != 2 || weight.size() != 2 || result.size() != 2 || weight[transposed] != in[1] ||
      result[0] != in[0] || result[1] != weight[!transposed]) {
    return ffi::Error::InvalidArgument("astraea_product: x [T, I], w [I, O] or [O, I] and the result [T, O] do not fit");
  }
  const Sizes s{in[0], in[1], result[1]};
  const float* from = x.typed_data();
  float* to = out->typed_data();
  switch (w.element_type()) {
    case ffi::F32:
      product_of<float>(pool, s, from, w.untyped_data(), to, transposed);
      break;
    case ffi::U16:
      product_of<Bfloat16>(pool, s, from, w.untyped_data(), to, transposed);
      break;
    case ffi::S8:
      product_of<int8_t>(pool, s, from, w.untyped_data(), to, transposed);
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
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("transposed"));
