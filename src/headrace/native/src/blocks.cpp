// What a decoder computes between its matrix products, over many rows: the operations of rows.h, one pass over memory each.
#include "rows.h"

namespace headrace {
namespace {

// Below this many floats a parallel region costs more than it saves.
constexpr std::int64_t WORTH_THREADS = 1 << 15;

int team(std::int64_t floats, int threads) { return floats >= WORTH_THREADS ? threads : 1; }

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
    for (std::int64_t group = 0; group < groups; ++group)
      norm_row(x + row * x_stride + group * width, width, scale, epsilon, y + row * y_stride + group * width);
}

// y[rows, width] = activation(x[:, :width]), times x[:, width:] where `gated`; x is [rows, 2 * width], or [rows, width].
void headrace_gate(const float* x, std::int64_t rows, std::int64_t width, int activation, int gated, float* y, int threads) {
  threads = team(rows * width, threads);
  const std::int64_t stride = gated ? 2 * width : width;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < rows; ++row) gate_row(activation, x + row * stride, width, gated, y + row * width);
}

// Rotates the first `turned` of `size` dimensions of `heads` heads per row in place. cosines and sines: [rows, turned];
// rows of x are `stride` floats apart.
void headrace_rotate(float* x, std::int64_t stride, std::int64_t rows, std::int64_t heads, std::int64_t size,
                     std::int64_t turned, int interleaved, const float* cosines, const float* sines, int threads) {
  threads = team(rows * heads * size, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t head = 0; head < heads; ++head)
      rotate_head(x + row * stride + head * size, turned, interleaved, cosines + row * turned, sines + row * turned);
}

}  // extern "C"
