// Vectors of 32-bit integers and the dot product of four bytes they accumulate: u8 activations by s8 weights.
//
// Sums are exact (modulo 2^32) on every instruction set, so all of them give the same bits.
#pragma once

#include <cstring>

#include "simd.h"

namespace headrace {

#if defined(__AVX512F__) && defined(__AVX512BW__)

using ivec = __m512i;

inline ivec int_zero() { return _mm512_setzero_si512(); }
inline ivec int_load(const void* p) { return _mm512_loadu_si512(p); }
inline ivec int_broadcast(std::int32_t value) { return _mm512_set1_epi32(value); }
inline ivec int_subtract(ivec a, ivec b) { return _mm512_sub_epi32(a, b); }
inline vec to_float(ivec v) { return _mm512_cvtepi32_ps(v); }

// Each 32-bit lane: sum + a[0] * w[0] + ... + a[3] * w[3], a unsigned and w signed bytes.
inline ivec dot4(ivec sum, ivec a, ivec w) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, a, w);
#else
  const ivec even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
  const ivec odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(w, 8));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

using ivec = __m256i;

inline ivec int_zero() { return _mm256_setzero_si256(); }
inline ivec int_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline ivec int_broadcast(std::int32_t value) { return _mm256_set1_epi32(value); }
inline ivec int_subtract(ivec a, ivec b) { return _mm256_sub_epi32(a, b); }
inline vec to_float(ivec v) { return _mm256_cvtepi32_ps(v); }

inline ivec dot4(ivec sum, ivec a, ivec w) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, a, w);
#else
  // _mm256_maddubs_epi16 would saturate; split into even and odd bytes, 16-bit products are exact.
  const ivec even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const ivec odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(w, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}

#else

typedef std::int32_t ivec __attribute__((vector_size(16)));

inline ivec int_zero() { return ivec{0, 0, 0, 0}; }
inline ivec int_load(const void* p) {
  ivec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline ivec int_broadcast(std::int32_t value) { return ivec{value, value, value, value}; }
inline ivec int_subtract(ivec a, ivec b) { return reinterpret_cast<ivec>(reinterpret_cast<words4>(a) - reinterpret_cast<words4>(b)); }
inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

inline ivec dot4(ivec sum, ivec a, ivec w) {
  const words4 bytes = reinterpret_cast<words4>(a), weights = reinterpret_cast<words4>(w);
  words4 total = reinterpret_cast<words4>(sum);
  for (int byte = 0; byte < 4; ++byte) {
    const ivec weight = reinterpret_cast<ivec>(weights << (24 - 8 * byte)) >> 24;
    total += ((bytes >> (8 * byte)) & 255u) * reinterpret_cast<words4>(weight);
  }
  return reinterpret_cast<ivec>(total);
}

#endif

// The four bytes at `p` in every lane.
inline ivec broadcast_four(const std::uint8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return int_broadcast(word);
}

}  // namespace headrace
