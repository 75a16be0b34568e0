// Attention of a lone query, whose time is that of reading its context: each key and value is read once for all heads
// of the group, and the lanes of vectors are the dimensions of a head.
#pragma once

#include "pages.h"

namespace astraea {

constexpr int64_t kLoneChunk = 256;  // tokens of a context that are attended to at a time

template <typename T>
class Lone {
 public:
  static int64_t scratch(const Attention& a) {
    return a.group * (a.padded_dim() + kLoneChunk) + 2 * Tokens<T, kLanes>::scratch(a);
  }

  Lone(const Attention& a, const Unit& unit, Scratch& scratch)
      : a_(a),
        dim_(a.padded_dim()),
        queries_(scratch.take(a.group * dim_)),
        weights_(scratch.take(a.group * kLoneChunk)),
        keys_(a, unit, 0, scratch),
        values_(a, unit, 1, scratch) {
    std::fill(queries_, queries_ + a.group * dim_, 0.0f);
    for (int64_t g = 0; g < a.group; ++g) std::copy_n(a.query(unit.first, unit.head, g), a.dim, queries_ + g * dim_);
  }

  // Attends to the tokens from `begin` to `end`, at most kLoneChunk.
  void attend(int64_t begin, int64_t end, State& to) {
    const int64_t count = end - begin;
    for (int64_t i = 0; i < count; i += kLanes) {
      score(keys_.read(begin + i, std::min<int64_t>(kLanes, count - i)), weights_ + i);
    }
    for (int64_t g = 0; g < a_.group; ++g) weigh(weights_ + g * kLoneChunk, count, to.top[g], to.mass[g]);
    std::fill(to.out, to.out + a_.group * dim_, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      add_all(values_.read(begin + i, std::min<int64_t>(kLanes, count - i)), weights_ + i, to.out);
    }
  }

 private:
  void score(const float* const* keys, float* to) const {
    for (int64_t g = 0; g < a_.group; ++g) {
      Vec products[kLanes] = {};
      for (int64_t h = 0; h < dim_; h += kLanes) {
        const Vec query = load(queries_ + g * dim_ + h);
        for (int i = 0; i < kLanes; ++i) products[i] += query * load(keys[i] + h);
      }
      const Vec scores = sum_each(products);
      store(to + g * kLoneChunk, a_.soft_cap ? capped(scores, a_.soft_cap) : scores);
    }
  }

  // Makes weights of scores; the last ones, up to a whole vector, become 0.
  static void weigh(float* scores, int64_t count, float& top, float& mass) {
    std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, -kInfinity);
    Vec tops = broadcast(-kInfinity), masses{};
    for (int64_t i = 0; i < count; i += kLanes) tops = max(tops, load(scores + i));
    top = highest(tops);
    const float safe = top == -kInfinity ? 0 : top;
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec weights = exp(load(scores + i) - safe);
      store(scores + i, weights);
      masses += weights;
    }
    mass = sum(masses);
  }

  // Adds the values of kLanes tokens, times their weights, for blocks of sums that stay in registers.
  void add_all(const float* const* values, const float* weights, float* out) const {
    int64_t g = 0;
    for (; g + 3 <= a_.group; g += 3) add_heads<3>(values, weights + g * kLoneChunk, out + g * dim_);
    for (; g < a_.group; ++g) add_heads<1>(values, weights + g * kLoneChunk, out + g * dim_);
  }

  template <int heads>
  void add_heads(const float* const* values, const float* weights, float* out) const {
    int64_t h = 0;
    for (; h + 4 * kLanes <= dim_; h += 4 * kLanes) add<heads, 4>(values, h, weights, out + h);
    for (; h < dim_; h += kLanes) add<heads, 1>(values, h, weights, out + h);
  }

  template <int heads, int vecs>
  void add(const float* const* values, int64_t h, const float* weights, float* out) const {
    Vec sums[heads][vecs];
    for (int g = 0; g < heads; ++g) {
      for (int v = 0; v < vecs; ++v) sums[g][v] = load(out + g * dim_ + v * kLanes);
    }
    for (int i = 0; i < kLanes; ++i) {
      Vec value[vecs];
      for (int v = 0; v < vecs; ++v) value[v] = load(values[i] + h + v * kLanes);
      for (int g = 0; g < heads; ++g) {
        const Vec weight = broadcast(weights[g * kLoneChunk + i]);
        for (int v = 0; v < vecs; ++v) sums[g][v] += weight * value[v];
      }
    }
    for (int g = 0; g < heads; ++g) {
      for (int v = 0; v < vecs; ++v) store(out + g * dim_ + v * kLanes, sums[g][v]);
    }
  }

  const Attention& a_;
  const int64_t dim_;
  float *const queries_, *const weights_;  // [G, padded H], [G, kLoneChunk]
  Tokens<T, kLanes> keys_, values_;
};

}  // namespace astraea
