// A layer's attention as its parts see it: the sizes and arrays of a step, and how results of pieces are joined.
#pragma once

#include <cstdint>
#include <vector>

#include "arithmetic.h"

namespace astraea {

// Shapes are as in kernels/backend.py and models/heads.py.
struct Attention {
  int64_t tokens, heads, group, dim;  // T, K, G, H
  int64_t rows, width;                // R, M
  int64_t num_pages, page_size;       // P, S
  const float *qkv, *cos, *sin;
  const float *q_norm, *k_norm, *sinks;  // null if there are none
  const int32_t *page_table, *kv_lens, *starts, *slots;
  void* pages;
  float* out;  // [T, N, H], first the rotated queries times the scale
  float eps, scale, soft_cap;  // soft_cap is 0 if there is none
  int64_t window;              // 0 if there is none

  // H, with zeros behind it, so that vectors and blocks of eight fit.
  int64_t padded_dim() const {
    constexpr int64_t multiple = kLanes < 8 ? 8 : kLanes;
    return (dim + multiple - 1) / multiple * multiple;
  }

  float* query(int64_t token, int64_t head, int64_t g) const {
    return out + ((token * heads + head) * group + g) * dim;
  }
};

// Consecutive queries of one row in one key/value head, which share what is read of their context.
struct Unit {
  int64_t row, head;
  int64_t first, count;     // tokens of the step
  int64_t position;         // of the first query in its context
  int64_t begin, end;       // what its queries see of the context
  bool lone;                // whether it is the only query of its row
};

// Memory of a thread for one piece of work, kept for the next. Arrays begin with a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < size + kLine) memory.resize(size + kLine);
    next_ = memory.data() + kLine - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kLine;
  }

  float* take(int64_t size) {
    float* from = next_;
    next_ += aligned(size);
    return from;
  }

  // What is taken for an array of this size.
  static int64_t aligned(int64_t size) { return (size + kLine - 1) / kLine * kLine; }

 private:
  static constexpr int64_t kLine = 16;
  float* next_;
};

// What is known of `rows` queries after a part of their context: the highest score and the sum of weights of each, and
// the weighted sum of values. A query's heads of a group are rows side by side.
struct State {
  int64_t rows, dim;
  float *top, *mass, *out;

  static int64_t size(int64_t rows, int64_t dim) { return Scratch::aligned(rows * dim + 2 * rows); }

  State(float* memory, int64_t rows, int64_t dim)
      : rows(rows), dim(dim), top(memory + rows * dim), mass(top + rows), out(memory) {}

  // Before any token; sinks take part in the sum of weights with a value of 0.
  void start(const float* sinks, int64_t group) {
    for (int64_t m = 0; m < rows; ++m) {
      top[m] = sinks ? sinks[m % group] : -kInfinity;
      mass[m] = sinks ? 1 : 0;
    }
    std::fill(out, out + rows * dim, 0.0f);
  }

  // Adds the part of the context that follows.
  void join(const State& next) {
    for (int64_t m = 0; m < rows; ++m) {
      const float higher = next.top[m] > top[m] ? next.top[m] : top[m];
      const float safe = higher == -kInfinity ? 0 : higher;
      const float ours = exp(top[m] - safe), theirs = exp(next.top[m] - safe);
      top[m] = higher;
      mass[m] = mass[m] * ours + next.mass[m] * theirs;
      float* to = out + m * dim;
      const float* from = next.out + m * dim;
      for (int64_t h = 0; h < dim; h += kLanes) store(to + h, load(to + h) * ours + load(from + h) * theirs);
    }
  }

  // Writes the results of a unit's queries.
  void finish(const Attention& a, const Unit& unit) const {
    for (int64_t m = 0; m < rows; ++m) {
      const float share = mass[m] == 0 ? 0 : 1 / mass[m];
      float* to = a.query(unit.first + m / a.group, unit.head, m % a.group);
      for (int64_t h = 0; h < a.dim; ++h) to[h] = out[m * dim + h] * share;
    }
  }
};

}  // namespace astraea
