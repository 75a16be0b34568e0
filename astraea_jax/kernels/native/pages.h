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
  // Copies of the sign end in the exponent of float32, and are taken out of it.
  const Ints bits = widened(reinterpret_cast<const int8_t*>(from)) << 20 & static_cast<int32_t>(0x87f00000);
  const Ints size = bits & 0x07f00000;
  // Exponents begin at -6 here and at -126 in float32. Below that, numbers are multiples of 2^-9: they are had from the
  // next exponent by a subtraction, since XLA has the processor take denormal numbers of float32 for 0.
  const Ints small = size < 0x00800000, sign = bits & INT32_MIN;
  const Vec one = (Vec)(bits + (120 << 23) + (small & 1 << 23)), rest = (Vec)(small & (sign | 121 << 23));
  return size == 0x07f00000 ? broadcast(__builtin_nanf("")) : one - rest;
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

// Tokens of a unit's context, keys (side 0) or values (1), in blocks of `length` tokens.
template <typename T, int length>
class Tokens {
 public:
  static int64_t scratch(const Attention& a) { return length * a.padded_dim(); }

  Tokens(const Attention& a, const Unit& unit, int64_t side, Scratch& scratch)
      : a_(a), unit_(unit), side_(side), padded_(a.padded_dim()), copies_(scratch.take(this->scratch(a))) {}

  // Where the block at `position` lies, if it can be read there: if the unit sees all of it, in one page and in whole
  // vectors. Else null.
  const T* in_place(int64_t position) const {
    const bool seen = position >= unit_.begin && position + length <= unit_.end;
    const bool whole = padded_ == a_.dim && position % a_.page_size + length <= a_.page_size;
    return seen && whole ? at(position) : nullptr;
  }

  // The block at `position`, a multiple of `length`, as [length, padded H], with zeros for tokens that the unit does not
  // see; it lasts until the next one.
  const float* copy(int64_t position) const {
    const int64_t begin = std::max(position, unit_.begin), end = std::min(position + length, unit_.end);
    std::fill(copies_, copies_ + (begin - position) * padded_, 0.0f);
    for (int64_t token = begin; token < end;) {
      const T* from = at(token);
      const int64_t stop = std::min(end, (token / a_.page_size + 1) * a_.page_size);
      for (; token < stop; ++token, from += a_.dim) widen(from, copies_ + (token - position) * padded_);
    }
    std::fill(copies_ + (end - position) * padded_, copies_ + length * padded_, 0.0f);
    return copies_;
  }

 private:
  const T* at(int64_t position) const {
    const int64_t page = a_.page_table[unit_.row * a_.width + position / a_.page_size];
    return token_at<T>(a_, page, side_, unit_.head, position % a_.page_size);
  }

  void widen(const T* from, float* to) const {
    int64_t h = 0;
    for (; h + kLanes <= a_.dim; h += kLanes) store(to + h, load(from + h));
    for (; h < a_.dim; ++h) to[h] = load_one(from + h);
    std::fill(to + h, to + padded_, 0.0f);
  }

  const Attention& a_;
  const Unit& unit_;
  const int64_t side_, padded_;
  float* const copies_;
};

}  // namespace astraea
