// Functions of vectors that attention needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "vectors.h"

namespace astraea {

constexpr float kInfinity = __builtin_inff();

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float highest(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// e to the power of x <= 88, within two units in the last place; 0 where x < -87. NaN stays NaN.
//
// x is n ln 2 + r with |r| <= ln 2 / 2. The polynomial of r is that of Cephes' expf, and n is added to its exponent.
inline Vec exp(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // of this size, a float is a whole number
  const Vec n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = (Vec)((Bits)p + ((Bits)shifted << 23));
  return x < -87.0f ? Vec{} : power;
}

inline float exp(float x) { return exp(broadcast(x))[0]; }

// Scores after a cap: cap * tanh(score / cap).
inline Vec capped(Vec score, float cap) {
  const Vec twice = score * (2.0f / cap);
  return cap - 2.0f * cap / (exp(twice > 80.0f ? broadcast(80.0f) : twice) + 1.0f);
}


// Of groups of 2n lanes of two vectors: where lane i of the lower halves side by side comes from.
template <int n>
constexpr int lower(int i) {
  return i % (2 * n) < n ? i : kLanes + i - n;
}

// The lower halves of groups of 2n lanes of a and b side by side, or the upper ones (offset n).
template <int n, int offset, int... i>
inline Vec halves(Vec a, Vec b, std::integer_sequence<int, i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (lower<n>(i) + offset)...);
#else
  return __builtin_shuffle(a, b, Ints{(lower<n>(i) + offset)...});
#endif
}

// Takes groups of 2n lanes of a and b apart: `first` has their lower halves side by side, `second` the upper ones.
template <int n>
inline void exchange(Vec a, Vec b, Vec& first, Vec& second) {
  const std::make_integer_sequence<int, kLanes> lanes;
  first = halves<n, 0>(a, b, lanes);
  second = halves<n, n>(a, b, lanes);
}

// The sums of kLanes vectors, as one vector; overwrites them.
template <int n = kLanes / 2>
inline Vec sum_each(Vec* v) {
  if constexpr (n > 0) {
    for (int i = 0; i < n; ++i) {
      Vec first, second;
      exchange<n>(v[i], v[i + n], first, second);
      v[i] = first + second;
    }
    return sum_each<n / 2>(v);
  } else {
    return v[0];
  }
}

// Turns rows into columns.
template <int n = kLanes / 2>
inline void transpose(Vec* v) {
  if constexpr (n > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if (i % (2 * n) < n) exchange<n>(v[i], v[i + n], v[i], v[i + n]);
    }
    transpose<n / 2>(v);
  }
}

// Writes the first `count` rows of the transpose of `from [rows, columns]`; both numbers are multiples of kLanes.
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t count) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < count; c += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (r + i) * columns + c);
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(kLanes, count - c); ++i) store(to + (c + i) * rows + r, block[i]);
    }
  }
}

}  // namespace astraea
