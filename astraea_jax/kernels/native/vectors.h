// Vectors of float32, as wide as the processor's, and numbers of fewer bits widened to them.
#pragma once

#include <cstdint>
#include <cstring>

namespace astraea {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
typedef int8_t Byte __attribute__((vector_size(kLanes)));

// Types of the numbers in memory. Those of bfloat16 have a type of their own, as C++ has none for them before 2023.
struct Bfloat16 {
  uint16_t bits;
};

template <typename V>
inline V bytes_at(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

inline Vec load(const float* from) { return bytes_at<Vec>(from); }

inline Vec load(const Bfloat16* from) {
  return (Vec)(__builtin_convertvector(bytes_at<Half>(from), Bits) << 16);
}

inline Vec load(const int8_t* from) { return __builtin_convertvector(bytes_at<Byte>(from), Vec); }

inline float load_one(const float* from) { return *from; }

inline float load_one(const Bfloat16* from) {
  const uint32_t bits = uint32_t{from->bits} << 16;
  return bytes_at<float>(&bits);
}

inline float load_one(const int8_t* from) { return *from; }

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }

inline Vec broadcast(float x) { return x - Vec{}; }

inline float sum(Vec v) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  }
  return v[0];
}

}  // namespace astraea
