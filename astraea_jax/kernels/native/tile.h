// Attention of a tile of queries of one row, as flash attention does it (online softmax, arXiv 2205.14135): the lanes
// of vectors are queries, so that keys and values are read as they lie, and each softmax stays within its lane.
#pragma once

#include "pages.h"

namespace astraea {

constexpr int64_t kTileChunk = 2048;  // tokens of a context that are attended to at a time
constexpr int64_t kTileBlock = 64;    // of these, those that stay in the nearest cache

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;  // 24 sums, 3 vectors and a factor stay in 32 registers,
#else
constexpr int kTileRows = 4;  // 12 sums, 3 vectors and a factor in 16
#endif
constexpr int kTileVecs = 3;
constexpr int64_t kPanel = kTileVecs * kLanes;  // lanes that are computed together
constexpr int64_t kTileLanes = 144;  // heads of the queries of a tile: whole panels, however wide vectors are

inline int64_t tile_queries(int64_t group) { return std::max<int64_t>(1, kTileLanes / group); }

template <typename T>
class Tile {
 public:
  static int64_t scratch(const Attention& a, int64_t queries) {
    const int64_t lanes = padded(queries * a.group);
    return lanes * (2 * a.padded_dim() + kTileBlock) + 3 * Scratch::aligned(lanes) +
           2 * Tokens<T, kTileBlock>::scratch(a);
  }

  Tile(const Attention& a, const Unit& unit, Scratch& scratch)
      : a_(a),
        unit_(unit),
        dim_(a.padded_dim()),
        used_(unit.count * a.group),
        lanes_(padded(used_)),
        queries_(scratch.take(lanes_ * dim_)),
        out_(scratch.take(lanes_ * dim_)),
        top_(scratch.take(lanes_)),
        mass_(scratch.take(lanes_)),
        position_(scratch.take(lanes_)),
        scores_(scratch.take(lanes_ * kTileBlock)),
        keys_(a, unit, 0, scratch),
        values_(a, unit, 1, scratch) {
    std::fill(out_, out_ + lanes_ * dim_, 0.0f);
    for (int64_t m = 0; m < used_; ++m) {
      std::copy_n(a.query(unit.first + m / a.group, unit.head, m % a.group), a.dim, out_ + m * dim_);
    }
    transpose(out_, lanes_, dim_, queries_, dim_);
    for (int64_t m = 0; m < lanes_; ++m) position_[m] = unit.position + std::min(m, used_ - 1) / a.group;
  }

  // Attends to the tokens from `begin` to `end`, which lie between two multiples of kTileChunk.
  void attend(int64_t begin, int64_t end, State& to) {
    std::fill(out_, out_ + lanes_ * dim_, 0.0f);
    std::fill(top_, top_ + lanes_, -kInfinity);
    std::fill(mass_, mass_ + lanes_, 0.0f);
    for (int64_t at = begin / kTileBlock * kTileBlock; at < end; at += kTileBlock) {
      const float *keys = rows(keys_, at), *values = rows(values_, at);
      int64_t lane = 0;
      for (; lane + kPanel <= lanes_; lane += kPanel) visit<kTileVecs>(lane, at, keys, values);
      if (lane + 2 * kLanes == lanes_) visit<2>(lane, at, keys, values);
      if (lane + kLanes == lanes_) visit<1>(lane, at, keys, values);
    }
    std::copy_n(top_, used_, to.top);
    std::copy_n(mass_, used_, to.mass);
    transpose(out_, dim_, lanes_, to.out, used_);
  }

 private:
  static int64_t padded(int64_t lanes) { return (lanes + kLanes - 1) / kLanes * kLanes; }

  // A block of tokens as float32, where it lies if it is so.
  static const float* rows(const Tokens<T, kTileBlock>& tokens, int64_t at) {
    if constexpr (std::is_same_v<T, float>) {
      if (const float* place = tokens.in_place(at)) return place;
    }
    return tokens.copy(at);
  }

  // Adds a block of tokens for a panel of lanes, but those that none of it sees.
  template <int vecs>
  void visit(int64_t lane, int64_t at, const float* keys, const float* values) const {
    const int64_t first = position_[lane], last = position_[lane + vecs * kLanes - 1];
    const int64_t stop = std::min(kTileBlock, last + 1 - at);
    const int64_t unseen = a_.window ? std::max<int64_t>(0, first - a_.window + 1 - at) : 0;
    const int64_t start = unseen / kTileRows * kTileRows;
    if (start >= stop) return;
    for (int64_t i = start; i < stop; i += kTileRows) score<vecs>(lane, i, keys);
    if (at + stop - 1 > first || (a_.window && at + start <= last - a_.window)) mask<vecs>(lane, at, start, stop);
    Vec shrink[vecs];
    for (int v = 0; v < vecs; ++v) shrink[v] = weigh(lane + v * kLanes, start, stop);
    for (int64_t h = 0; h < dim_; h += kTileRows) add<vecs>(lane, h, start, stop, values, shrink);
  }

  // Scores of kTileRows tokens.
  template <int vecs>
  void score(int64_t lane, int64_t token, const float* keys) const {
    Vec sums[kTileRows][vecs] = {};
    for (int64_t h = 0; h < a_.dim; ++h) {
      Vec query[vecs];
      for (int v = 0; v < vecs; ++v) query[v] = load(queries_ + h * lanes_ + lane + v * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const Vec key = broadcast(keys[(token + r) * dim_ + h]);
        for (int v = 0; v < vecs; ++v) sums[r][v] += key * query[v];
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < vecs; ++v) {
        const Vec score = sums[r][v];
        store(scores_ + (token + r) * lanes_ + lane + v * kLanes, a_.soft_cap ? capped(score, a_.soft_cap) : score);
      }
    }
  }

  template <int vecs>
  void mask(int64_t lane, int64_t at, int64_t start, int64_t stop) const {
    for (int v = 0; v < vecs; ++v) {
      const Vec position = load(position_ + lane + v * kLanes);
      for (int64_t i = start; i < stop; ++i) {
        float* score = scores_ + i * lanes_ + lane + v * kLanes;
        const Vec behind = position - static_cast<float>(at + i);  // tokens from the key to the query
        Ints seen = behind >= 0.0f;
        if (a_.window) seen &= behind < static_cast<float>(a_.window);
        store(score, seen ? load(score) : broadcast(-kInfinity));
      }
    }
  }

  // Makes weights of the scores of some lanes; returns what their sums so far shrink by.
  Vec weigh(int64_t lane, int64_t start, int64_t stop) const {
    const Vec before = load(top_ + lane);
    Vec top = before;
    for (int64_t i = start; i < stop; ++i) top = max(top, load(scores_ + i * lanes_ + lane));
    const Vec safe = top == -kInfinity ? Vec{} : top, shrink = exp(before - safe);
    Vec mass = load(mass_ + lane) * shrink;
    for (int64_t i = start; i < stop; ++i) {
      float* score = scores_ + i * lanes_ + lane;
      const Vec weight = exp(load(score) - safe);
      store(score, weight);
      mass += weight;
    }
    store(top_ + lane, top);
    store(mass_ + lane, mass);
    return shrink;
  }

  // Adds weighted values to kTileRows dimensions of the output.
  template <int vecs>
  void add(int64_t lane, int64_t h, int64_t start, int64_t stop, const float* values,
           const Vec* shrink) const {
    Vec sums[kTileRows][vecs];
    float* out = out_ + h * lanes_ + lane;
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < vecs; ++v) sums[r][v] = load(out + r * lanes_ + v * kLanes) * shrink[v];
    }
    for (int64_t i = start; i < stop; ++i) {
      Vec weight[vecs];
      for (int v = 0; v < vecs; ++v) weight[v] = load(scores_ + i * lanes_ + lane + v * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const Vec value = broadcast(values[i * dim_ + h + r]);
        for (int v = 0; v < vecs; ++v) sums[r][v] += value * weight[v];
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < vecs; ++v) store(out + r * lanes_ + v * kLanes, sums[r][v]);
    }
  }

  const Attention& a_;
  const Unit& unit_;
  const int64_t dim_, used_, lanes_;
  float *const queries_, *const out_;                     // [padded H, lanes]
  float *const top_, *const mass_, *const position_;      // [lanes]
  float* const scores_;                                   // [kTileBlock, lanes]
  const Tokens<T, kTileBlock> keys_, values_;
};

}  // namespace astraea
