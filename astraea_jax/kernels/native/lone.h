// Attention of a lone query, whose time is that of reading its context: each key and value is read once for all heads
// of the group, and the lanes of vectors are the dimensions of a head.
#pragma once

#include "pages.h"

namespace astraea {

constexpr int64_t kLoneChunk = 256;     // tokens of a context that are attended to at a time
constexpr int64_t kAhead = 2 * kLanes;  // tokens between what is fetched from memory and what is computed
constexpr int kLoneHeads = 4;  // whose sums of so many vectors stay in registers:
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLoneVecs = 4;
#else
constexpr int kLoneVecs = 2;
#endif

template <typename T>
class Lone {
 public:
  static int64_t scratch(const Attention& a) {
    return Scratch::aligned(a.group * a.padded_dim()) + a.group * (kLoneChunk + kLanes * kLanes) +
           3 * Tokens<T, kLanes>::scratch(a);
  }

  // `next` are the keys that this thread will probably read after those of the unit.
  Lone(const Attention& a, const Unit& unit, const Unit& next, Scratch& scratch)
      : a_(a),
        unit_(unit),
        next_(next),
        dim_(a.padded_dim()),
        queries_(scratch.take(a.group * dim_)),
        weights_(scratch.take(a.group * kLoneChunk)),
        products_(scratch.take(a.group * kLanes * kLanes)),
        keys_(a, unit, 0, scratch),
        values_(a, unit, 1, scratch),
        next_keys_(a, next, 0, scratch) {
    for (int64_t g = 0; g < a.group; ++g) {
      float* query = queries_ + g * dim_;
      std::fill(std::copy_n(a.query(unit.first, unit.head, g), a.dim, query), query + dim_, 0.0f);
    }
  }

  // Attends to the tokens from `begin` to `end`, which lie between two multiples of kLoneChunk.
  void attend(int64_t begin, int64_t end, State& to) {
    const int64_t start = begin / kLanes * kLanes, count = (end - start + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < count; i += kLanes) {
      const T *keys = keys_.in_place(start + i), *next = later(start, count, i + kAhead);
      if (keys) {
        score(keys, next, weights_ + i);
      } else {
        score(keys_.copy(start + i), next, weights_ + i);
      }
      hide(begin - start - i, end - start - i, weights_ + i);
    }
    for (int64_t g = 0; g < a_.group; ++g) weigh(weights_ + g * kLoneChunk, count, to.top[g], to.mass[g]);
    std::fill(to.out, to.out + a_.group * dim_, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const T *values = values_.in_place(start + i), *next = later(start, count, count + i + kAhead);
      if (values) {
        add(values, next, weights_ + i, to.out);
      } else {
        add(values_.copy(start + i), next, weights_ + i, to.out);
      }
    }
  }

 private:
  // What is read some tokens after the first key of a chunk (its keys, its values, the keys that follow), or null if it
  // does not lie together.
  const T* later(int64_t start, int64_t count, int64_t tokens) const {
    if (tokens < count) return keys_.in_place(start + tokens);
    if (tokens < 2 * count) return values_.in_place(start + tokens - count);
    const int64_t after = start + tokens - count;
    if (after < unit_.end) return keys_.in_place(after);
    return next_keys_.in_place(next_.begin / kLanes * kLanes + after - start - count);
  }

  // Calls a function for every block of heads and vectors of dimensions, whose sizes are known at compile time.
  template <typename Function>
  void blocks(const Function& call) const {
    int64_t g = 0;
    for (; g + kLoneHeads <= a_.group; g += kLoneHeads) blocks_of<kLoneHeads>(g, call);
    if (a_.group - g == 3) blocks_of<3>(g, call);
    if (a_.group - g == 2) blocks_of<2>(g, call);
    if (a_.group - g == 1) blocks_of<1>(g, call);
  }

  template <int heads, typename Function>
  void blocks_of(int64_t g, const Function& call) const {
    const std::integral_constant<int, heads> some;
    int64_t h = 0;
    for (; h + kLoneVecs * kLanes <= dim_; h += kLoneVecs * kLanes) {
      call(some, std::integral_constant<int, kLoneVecs>(), g, h);
    }
    for (; h < dim_; h += kLanes) call(some, std::integral_constant<int, 1>(), g, h);
  }

  // Scores of kLanes keys [kLanes, padded H]; `next` are those to fetch meanwhile.
  template <typename E>
  void score(const E* keys, const T* next, float* to) const {
    blocks([&](auto heads, auto vecs, int64_t g, int64_t h) {
      multiply<heads, vecs>(keys + h, next && g == 0 ? next + h : nullptr, g, h);
    });
    for (int64_t g = 0; g < a_.group; ++g) {
      Vec products[kLanes];
      for (int i = 0; i < kLanes; ++i) products[i] = load(products_ + (g * kLanes + i) * kLanes);
      const Vec scores = sum_each(products);
      store(to + g * kLoneChunk, a_.soft_cap ? capped(scores, a_.soft_cap) : scores);
    }
  }

  // Products of keys with some queries in some dimensions, which are not yet summed over the lanes.
  template <int heads, int vecs, typename E>
  void multiply(const E* keys, const T* next, int64_t g, int64_t h) const {
    Vec query[heads][vecs];
    for (int i = 0; i < heads; ++i) {
      for (int v = 0; v < vecs; ++v) query[i][v] = load(queries_ + (g + i) * dim_ + h + v * kLanes);
    }
    float* to = products_ + g * kLanes * kLanes;
    for (int token = 0; token < kLanes; ++token, to += kLanes) {
      if (next) fetch<vecs>(next + token * dim_);
      Vec sums[heads];
      for (int i = 0; i < heads; ++i) sums[i] = h ? load(to + i * kLanes * kLanes) : Vec{};
      for (int v = 0; v < vecs; ++v) {
        const Vec key = load(keys + token * dim_ + v * kLanes);
        for (int i = 0; i < heads; ++i) sums[i] += query[i][v] * key;
      }
      for (int i = 0; i < heads; ++i) store(to + i * kLanes * kLanes, sums[i]);
    }
  }

  // Has some vectors fetched into the nearest cache.
  template <int vecs>
  static void fetch(const T* from) {
    constexpr int bytes = vecs * kLanes * sizeof(T);
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + i);
  }

  // Hides all but the tokens from `begin` to `end` of a block.
  void hide(int64_t begin, int64_t end, float* scores) const {
    for (int64_t g = 0; g < a_.group; ++g, scores += kLoneChunk) {
      if (begin > 0) std::fill(scores, scores + begin, -kInfinity);
      if (end < kLanes) std::fill(scores + end, scores + kLanes, -kInfinity);
    }
  }

  // Makes weights of scores.
  static void weigh(float* scores, int64_t count, float& top, float& mass) {
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

  // Adds kLanes values [kLanes, padded H] times their weights; `next` are those to fetch meanwhile.
  template <typename E>
  void add(const E* values, const T* next, const float* weights, float* out) const {
    blocks([&](auto heads, auto vecs, int64_t g, int64_t h) {
      add_block<heads, vecs>(values + h, next && g == 0 ? next + h : nullptr, weights + g * kLoneChunk,
                             out + g * dim_ + h);
    });
  }

  template <int heads, int vecs, typename E>
  void add_block(const E* values, const T* next, const float* weights, float* out) const {
    Vec sums[heads][vecs];
    for (int i = 0; i < heads; ++i) {
      for (int v = 0; v < vecs; ++v) sums[i][v] = load(out + i * dim_ + v * kLanes);
    }
    for (int token = 0; token < kLanes; ++token) {
      if (next) fetch<vecs>(next + token * dim_);
      Vec weight[heads];
      for (int i = 0; i < heads; ++i) weight[i] = broadcast(weights[i * kLoneChunk + token]);
      for (int v = 0; v < vecs; ++v) {
        const Vec value = load(values + token * dim_ + v * kLanes);
        for (int i = 0; i < heads; ++i) sums[i][v] += weight[i] * value;
      }
    }
    for (int i = 0; i < heads; ++i) {
      for (int v = 0; v < vecs; ++v) store(out + i * dim_ + v * kLanes, sums[i][v]);
    }
  }

  const Attention& a_;
  const Unit &unit_, &next_;
  const int64_t dim_;
  float *const queries_, *const weights_;  // [G, padded H], [G, kLoneChunk]
  float* const products_;                  // [G, kLanes, kLanes]
  const Tokens<T, kLanes> keys_, values_, next_keys_;
};

}  // namespace astraea
