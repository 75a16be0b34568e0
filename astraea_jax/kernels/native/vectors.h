// Vectors of float32, as wide as the processor's, and numbers of fewer bits widened to them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
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

// Narrow numbers as 32 bits each. By itself GCC 12 makes up to fifty instructions of what is one.
inline Bits widened(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(bytes_at<__m256i>(from));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(bytes_at<__m128i>(from));
#else
  return __builtin_convertvector(bytes_at<Half>(from), Bits);
#endif
}

inline Ints widened(const int8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(bytes_at<__m128i>(from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes_at<int64_t>(from)));
#else
  return __builtin_convertvector(bytes_at<Byte>(from), Ints);
#endif
}

inline Vec load(const float* from) { return bytes_at<Vec>(from); }

inline Vec load(const Bfloat16* from) {
  return (Vec)(widened(&from->bits) << 16);
}

inline Vec load(const int8_t* from) { return __builtin_convertvector(widened(from), Vec); }

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
