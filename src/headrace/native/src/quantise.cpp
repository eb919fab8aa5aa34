// Rows of activations as bytes with one scale each.
#include <cmath>
#include <cstring>

#include "product.h"

namespace headrace {

namespace {

constexpr std::uint32_t MAGNITUDE = 0x7fffffffu;
constexpr std::uint32_t INFINITE = 0x7f800000u;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer nearest to a small float in the low bits

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace

void quantise_row(const float* x, isize depth, std::uint8_t* bytes, float* scale) {
  // As integers, magnitudes stand in the order of the floats, with infinity and NaN above all.
  std::uint32_t largest = 0;
  for (isize k = 0; k < depth; ++k) {
    const std::uint32_t magnitude = bits_of(x[k]) & MAGNITUDE;
    largest = magnitude > largest ? magnitude : largest;
  }
  float most;
  std::memcpy(&most, &largest, sizeof most);
  // Below this the factor would overflow: such a row is zero to any precision that matters.
  const bool zero = most < 1e-30f, finite = largest < INFINITE;
  const float factor = zero || !finite ? 0.0f : 127.0f / most;
  *scale = finite ? (zero ? 0.0f : most / 127.0f) : std::nanf("");
  if (finite)
    for (isize k = 0; k < depth; ++k) bytes[k] = static_cast<std::uint8_t>(bits_of(x[k] * factor + ROUND) + 128u);
  else
    std::memset(bytes, 128, depth);
  std::memset(bytes + depth, 128, byte_stride(depth) - depth);
}

}  // namespace headrace
