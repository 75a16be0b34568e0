// Keys and values in pages [P, 2, K, S, H]: writing them, and reading a few tokens of one head.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention.h"

namespace astraea {

struct Float8 {  // e4m3fn: a sign, four bits of exponent, three of fraction; no infinity, and all ones is NaN
  uint8_t bits;
};

inline Vec load(const Float8* from) {
  typedef uint8_t Eight __attribute__((vector_size(kLanes)));
  const Bits bits = __builtin_convertvector(bytes_at<Eight>(from), Bits), low = bits & 0x7f;
  // Exponents begin at -6 here and at -126 in float32. Below that, numbers are multiples of 2^-9; as denormal ones of
  // float32 they could be lost, since XLA has the processor take those for 0.
  const Vec normal = (Vec)((low << 20) + (120u << 23));
  const Vec small = __builtin_convertvector((Ints)low, Vec) * 0x1p-9f;
  const Bits number = low < 8 ? (Bits)small : low == 0x7f ? Bits{} + 0x7fc00000u : (Bits)normal;
  return (Vec)(number | (bits & 0x80) << 24);
}

inline float load_one(const Float8* from) {
  const int exponent = from->bits >> 3 & 15, fraction = from->bits & 7;
  const float size = (from->bits & 0x7f) == 0x7f ? __builtin_nanf("")
                     : exponent == 0             ? std::ldexp(static_cast<float>(fraction), -9)
                                                 : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return from->bits & 0x80 ? -size : size;
}

// Rounding to the nearest number of a page, to the even one of two; float8 clips first, as `stored` does.
inline void put(float x, float* to) { *to = x; }

inline void put(float x, Bfloat16* to) {
  const uint32_t bits = bytes_at<uint32_t>(&x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void put(float x, Float8* to) {
  const float size = std::min(std::fabs(x), 448.0f), shifted = size + 16384.0f;  // whose last digit is 2^-9
  const uint32_t bits = bytes_at<uint32_t>(&size);
  const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t small = bytes_at<uint32_t>(&shifted) & 0xf;
  const uint32_t sign = bytes_at<uint32_t>(&x) >> 24 & 0x80;
  to->bits = (x != x ? 0x7f : size < 0x1p-6f ? small : normal) | sign;
}

template <typename T>
T* token_at(const Attention& a, int64_t page, int64_t side, int64_t head, int64_t offset) {
  return static_cast<T*>(a.pages) + (((page * 2 + side) * a.heads + head) * a.page_size + offset) * a.dim;
}

// Keys or values of consecutive tokens, as rows of float32 with padded_dim() columns, and what is to be read later.
template <typename T>
struct Rows {
  const float* data;
  int64_t stride;
  const T* later;
  int64_t later_stride;

  // Has a vector of a later row fetched into the nearest cache.
  void fetch_later(int64_t row, int64_t h) const { __builtin_prefetch(later + row * later_stride + h); }
};

// Tokens of a unit's context, keys (side 0) or values (1), in blocks of `length`.
template <typename T, int length>
class Tokens {
 public:
  static int64_t scratch(const Attention& a) { return length * a.padded_dim(); }

  Tokens(const Attention& a, const Unit& unit, int64_t side, Scratch& scratch)
      : a_(a), unit_(unit), side_(side), copies_(scratch.take(this->scratch(a))) {}

  // The block at `position`, a multiple of `length`, with zeros for tokens that the unit does not see. They are copied
  // unless they lie as they are needed.
  Rows<T> read(int64_t position, const T* later) const {
    const int64_t padded = a_.padded_dim();
    const T* whole = whole_block(position);
    if (!later) later = whole ? whole : first_token(std::max(position, unit_.begin));
    if (std::is_same_v<T, float> && padded == a_.dim && whole) {
      return {reinterpret_cast<const float*>(whole), padded, later, a_.dim};
    }
    const int64_t begin = std::max(position, unit_.begin), end = std::min(position + length, unit_.end);
    std::fill(copies_, copies_ + (begin - position) * padded, 0.0f);
    for (int64_t at = begin; at < end;) {
      const T* from = first_token(at);
      const int64_t stop = std::min(end, (at / a_.page_size + 1) * a_.page_size);
      for (; at < stop; ++at, from += a_.dim) widen(from, copies_ + (at - position) * padded);
    }
    std::fill(copies_ + (end - position) * padded, copies_ + length * padded, 0.0f);
    return {copies_, padded, later, a_.dim};
  }

  // Where the block at `position` lies, if the unit sees it all and it lies in one page; else null.
  const T* whole_block(int64_t position) const {
    const bool whole = position >= unit_.begin && position + length <= unit_.end;
    return whole && position % a_.page_size + length <= a_.page_size ? first_token(position) : nullptr;
  }

 private:
  const T* first_token(int64_t position) const {
    const int64_t page = a_.page_table[unit_.row * a_.width + position / a_.page_size];
    return token_at<T>(a_, page, side_, unit_.head, position % a_.page_size);
  }

  void widen(const T* from, float* to) const {
    int64_t h = 0;
    for (; h + kLanes <= a_.dim; h += kLanes) store(to + h, load(from + h));
    for (; h < a_.dim; ++h) to[h] = load_one(from + h);
    std::fill(to + h, to + a_.padded_dim(), 0.0f);
  }

  const Attention& a_;
  const Unit& unit_;
  const int64_t side_;
  float* const copies_;  // [length, padded H]
};

}  // namespace astraea
