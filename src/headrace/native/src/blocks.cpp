// What a decoder computes between its matrix products, one pass over memory each: RMS norm, gated activation, rotary positions.
//
// Every row is computed by itself and in one fixed order, so its bits depend neither on the other rows nor on the threads.
// Loops over plain floats are written without branches and calls for the compiler to vectorise.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace headrace {
namespace {

using isize = std::ptrdiff_t;

// Below this many floats a parallel region costs more than it saves.
constexpr isize WORTH_THREADS = 1 << 15;

int team(isize floats, int threads) { return floats >= WORTH_THREADS ? threads : 1; }

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

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// The tanh form of GELU, through 1 + tanh(u) = 2 / (1 + exp(-2u)).
inline float gelu_tanh(float x) {
  const float u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

float sum_of_squares(const float* x, isize width) {
  constexpr int CHAINS = 4;
  vec sums[CHAINS];
  for (vec& sum : sums) sum = zero();
  isize i = 0;
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

enum Activation : int { SILU = 0, GELU_TANH = 1 };

template <float (*ACTIVATION)(float)>
void gate(const float* x, isize rows, isize width, float* y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize row = 0; row < rows; ++row) {
    const float* gates = x + row * 2 * width;
    float* to = y + row * width;
    for (isize i = 0; i < width; ++i) to[i] = ACTIVATION(gates[i]) * gates[width + i];
  }
}

}  // namespace
}  // namespace headrace

using namespace headrace;

extern "C" {

// y = x / sqrt(mean(x^2) + epsilon) * scale over each of `groups` runs of `width` floats in every row. The runs of a row
// follow one another and share `scale`; rows are x_stride and y_stride floats apart; y may be x.
void headrace_rms_norm(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t groups, std::int64_t width,
                       const float* scale, float epsilon, float* y, std::int64_t y_stride, int threads) {
  threads = team(rows * groups * width, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t group = 0; group < groups; ++group) {
      const float* from = x + row * x_stride + group * width;
      float* to = y + row * y_stride + group * width;
      const float factor = 1.0f / std::sqrt(sum_of_squares(from, width) / static_cast<float>(width) + epsilon);
      for (std::int64_t i = 0; i < width; ++i) to[i] = from[i] * factor * scale[i];
    }
}

// y[rows, width] = activation(x[:, :width]) * x[:, width:], x being [rows, 2 * width].
void headrace_gate(const float* x, std::int64_t rows, std::int64_t width, int activation, float* y, int threads) {
  threads = team(rows * width, threads);
  if (activation == GELU_TANH)
    gate<gelu_tanh>(x, rows, width, y, threads);
  else
    gate<silu>(x, rows, width, y, threads);
}

// Rotates the first `turned` of `size` dimensions of `heads` heads per row in place, pairing dimension i with i + turned / 2.
// cosines and sines: [rows, turned]; rows of x are `stride` floats apart.
void headrace_rotate(float* x, std::int64_t stride, std::int64_t rows, std::int64_t heads, std::int64_t size,
                     std::int64_t turned, const float* cosines, const float* sines, int threads) {
  threads = team(rows * heads * size, threads);
  const std::int64_t half = turned / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < rows; ++row) {
    const float *c = cosines + row * turned, *s = sines + row * turned;
    for (std::int64_t head = 0; head < heads; ++head) {
      float *first = x + row * stride + head * size, *second = first + half;
      for (std::int64_t i = 0; i < half; ++i) {
        const float a = first[i], b = second[i];
        first[i] = a * c[i] - b * s[i];
        second[i] = b * c[half + i] + a * s[half + i];
      }
    }
  }
}

}  // extern "C"
