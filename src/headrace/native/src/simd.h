// The widest vector of the machine the kernels are compiled for, behind a handful of inline functions.
//
// `vec` holds LANES floats. AVX-512 and AVX2+FMA use intrinsics; everything else (SSE2, NEON, ...) goes through the
// vector extensions that GCC and Clang share, with 128-bit vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace headrace {

#if defined(__AVX512F__) && defined(__AVX512BW__)

using vec = __m512;
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
constexpr const char* ISA = "avx512";

inline vec zero() { return _mm512_setzero_ps(); }
inline vec broadcast(float value) { return _mm512_set1_ps(value); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec multiply(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

// 2 * LANES bf16 values, vector `low` in the low halves of the 32-bit words and `high` in the high ones.
inline void load_pair(const std::uint16_t* p, vec& low, vec& high) {
  const __m512i words = _mm512_loadu_si512(p);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// A table of 16 floats, looked up by four bits of every 32-bit word: bits [shift, shift + 4).
struct Levels {
  using Words = __m512i;
  explicit Levels(const float* levels) : table(load(levels)) {}
  static Words words(const void* p) { return _mm512_loadu_si512(p); }
  vec pick(Words words, unsigned shift) const { return _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), table); }
  vec table;
};

#elif defined(__AVX2__) && defined(__FMA__)

using vec = __m256;
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
constexpr const char* ISA = "avx2";

inline vec zero() { return _mm256_setzero_ps(); }
inline vec broadcast(float value) { return _mm256_set1_ps(value); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec multiply(vec a, vec b) { return _mm256_mul_ps(a, b); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

inline void load_pair(const std::uint16_t* p, vec& low, vec& high) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  low = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  high = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

struct Levels {
  using Words = __m256i;
  explicit Levels(const float* levels) : low(load(levels)), high(load(levels + LANES)) {}
  static Words words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  vec pick(Words words, int shift) const {
    const Words index = _mm256_srli_epi32(words, shift);
    const vec upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper_half);
  }
  vec low, high;
};

#else

typedef float vec __attribute__((vector_size(16)));
typedef std::uint32_t words4 __attribute__((vector_size(16)));
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr const char* ISA = "generic";

inline vec zero() { return vec{0.0f, 0.0f, 0.0f, 0.0f}; }
inline vec broadcast(float value) { return vec{value, value, value, value}; }
inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec add(vec a, vec b) { return a + b; }
inline vec multiply(vec a, vec b) { return a * b; }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }

inline void load_pair(const std::uint16_t* p, vec& low, vec& high) {
  words4 words;
  std::memcpy(&words, p, sizeof words);
  low = reinterpret_cast<vec>(words << 16);
  high = reinterpret_cast<vec>(words & 0xffff0000u);
}

struct Levels {
  using Words = words4;
  explicit Levels(const float* levels) : table(levels) {}
  static Words words(const void* p) {
    words4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  vec pick(Words words, unsigned shift) const {
    const words4 index = (words >> shift) & 15u;
    return vec{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }
  const float* table;
};

#endif

// 2 * LANES floats.
inline void load_pair(const float* p, vec& low, vec& high) {
  low = load(p);
  high = load(p + LANES);
}

// The lanes' sum, in one fixed order.
inline float total(vec v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[LANES], sum = 0.0f;
  store(lanes, v);
  for (float lane : lanes) sum += lane;
  return sum;
#endif
}

// The first `count` floats of v, all of them where it has no more.
inline void store_some(float* p, vec v, std::ptrdiff_t count) {
  if (count >= LANES) return store(p, v);
  float lanes[LANES];
  store(lanes, v);
  for (std::ptrdiff_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// LOCALITY 3 brings a line into L1, 2 into L2.
template <int LOCALITY>
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, LOCALITY);
}

}  // namespace headrace
