// What a decoder computes on single rows between its matrix products: RMS norm, activations, rotary positions.
//
// Every row is computed by itself and in one fixed order, so its bits depend neither on the other rows nor on the threads.
// Loops over plain floats are written without branches and calls for the compiler to vectorise.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace headrace {

// exp(x) to about 2 units in the last place on [-87, 88], clamped outside: 2^n * e^r with n = round(x / ln 2) and |r| <= ln 2 / 2.
inline float exponential(float x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + ROUND;
  const float n = shifted - ROUND;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.0f / 5040.0f;
  series = series * r + 1.0f / 720.0f;
  series = series * r + 1.0f / 120.0f;
  series = series * r + 1.0f / 24.0f;
  series = series * r + 1.0f / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return series * scale;
}

inline float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The tanh form of GELU, through 1 + tanh(u) = 2 / (1 + exp(-2u)).
inline float gelu_tanh(float x) {
  const float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

// x * Phi(x). erf by Abramowitz and Stegun, 7.1.26: off by at most 1.5e-7.
inline float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float series = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float tail = 0.5f * series * exponential(-z * z);  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // in this order, so that NaN stays

inline float relu_squared(float x) { return relu(x) * relu(x); }

enum Activation : int { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, RELU_SQUARED = 4 };

template <float (*ACTIVATION)(float)>
inline void gate_row(const float* x, std::ptrdiff_t width, bool gated, float* y) {
  if (gated)
    for (std::ptrdiff_t i = 0; i < width; ++i) y[i] = ACTIVATION(x[i]) * x[width + i];
  else
    for (std::ptrdiff_t i = 0; i < width; ++i) y[i] = ACTIVATION(x[i]);
}

// y[width] = activation(x[:width]), times x[width:] where `gated`.
inline void gate_row(int activation, const float* x, std::ptrdiff_t width, bool gated, float* y) {
  switch (activation) {
    case SILU: return gate_row<silu>(x, width, gated, y);
    case GELU_TANH: return gate_row<gelu_tanh>(x, width, gated, y);
    case GELU: return gate_row<gelu>(x, width, gated, y);
    case RELU: return gate_row<relu>(x, width, gated, y);
    default: return gate_row<relu_squared>(x, width, gated, y);
  }
}

inline float sum_of_squares(const float* x, std::ptrdiff_t width) {
  constexpr int CHAINS = 4;
  vec sums[CHAINS];
  for (vec& sum : sums) sum = zero();
  std::ptrdiff_t i = 0;
  for (; i + CHAINS * LANES <= width; i += CHAINS * LANES)
    for (int c = 0; c < CHAINS; ++c) {
      const vec v = load(x + i + c * LANES);
      sums[c] = fma(v, v, sums[c]);
    }
  float lanes[LANES], total = 0.0f;
  store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (float lane : lanes) total += lane;
  for (; i < width; ++i) total += x[i] * x[i];
  return total;
}

// y = x / sqrt(mean(x^2) + epsilon) * scale; y may be x.
inline void norm_row(const float* x, std::ptrdiff_t width, const float* scale, float epsilon, float* y) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, width) / static_cast<float>(width) + epsilon);
  for (std::ptrdiff_t i = 0; i < width; ++i) y[i] = x[i] * factor * scale[i];
}

// Turns the first `turned` of a head's dimensions by a row's angles, in place: dimension i with i + turned / 2, or, interleaved,
// 2i with 2i + 1. cosines and sines: [turned], of which the second half belongs to the second of each pair; interleaved layouts
// have pair i's angle at i.
inline void rotate_head(float* x, std::ptrdiff_t turned, bool interleaved, const float* cosines, const float* sines) {
  const std::ptrdiff_t half = turned / 2;
  if (interleaved) {
    for (std::ptrdiff_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  float* second = x + half;
  for (std::ptrdiff_t i = 0; i < half; ++i) {
    const float a = x[i], b = second[i];
    x[i] = a * cosines[i] - b * sines[i];
    second[i] = b * cosines[half + i] + a * sines[half + i];
  }
}

}  // namespace headrace
