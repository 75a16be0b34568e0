// What becomes of a token before attention: norm and rotation of its queries and keys, and its place in the pages.
#pragma once

#include "pages.h"

namespace astraea {

// Writes x [H] after its norm (if there is one), its rotation, and times a factor.
inline void turn(const Attention& a, const float* x, const float* norm, int64_t token, float factor,
                 float* __restrict to) {
  const int64_t half = a.dim / 2;
  const float *cos = a.cos + token * half, *sin = a.sin + token * half;
  float inverse = 1;
  if (norm) {
    float squares = 0;
    for (int64_t h = 0; h < a.dim; ++h) squares += x[h] * x[h];
    inverse = 1 / std::sqrt(squares / a.dim + a.eps);
  }
  for (int64_t h = 0; h < half; ++h) {
    const float left = norm ? x[h] * inverse * norm[h] : x[h];
    const float right = norm ? x[half + h] * inverse * norm[half + h] : x[half + h];
    to[h] = (left * cos[h] - right * sin[h]) * factor;
    to[half + h] = (right * cos[h] + left * sin[h]) * factor;
  }
}

// Puts the queries of a token into the result, and its keys and values into its slot.
template <typename T>
void rotate_and_write(const Attention& a, int64_t token, float* key) {
  const int64_t page = a.slots[token] / a.page_size, offset = a.slots[token] % a.page_size;
  for (int64_t head = 0; head < a.heads; ++head) {
    const float* from = a.qkv + (token * a.heads + head) * (a.group + 2) * a.dim;
    for (int64_t g = 0; g < a.group; ++g, from += a.dim) {
      turn(a, from, a.q_norm, token, a.scale, a.query(token, head, g));
    }
    turn(a, from, a.k_norm, token, 1, key);
    const float* value = from + a.dim;
    T *k = token_at<T>(a, page, 0, head, offset), *v = token_at<T>(a, page, 1, head, offset);
    for (int64_t h = 0; h < a.dim; ++h) put(key[h], k + h);
    for (int64_t h = 0; h < a.dim; ++h) put(value[h], v + h);
  }
}

}  // namespace astraea
