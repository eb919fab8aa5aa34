// Products over int8 weights, symmetric with one scale per column, and activations as bytes with one scale per row.
//
// y[m, n] = (sum_k (a[m, k] - 128) * w[n, k]) * scale[m] * scale[n] + bias[n], the sum in integers. compensation[n] is 128 *
// sum_k w[n, k]. Integer sums are exact, so the paths (vector dot products, matrix tiles) give the same bits, and which one
// computes is a matter of speed.
//
// Layout. A panel holds byte_stride(K) / 4 steps of PANEL columns by 4 consecutive k. That is what a dot product instruction takes,
// and 16 steps of 16 columns are a tile of AMX. Columns beyond N and k beyond K are zeros.
#include <algorithm>
#include <cmath>
#include <memory>

#include "int8.h"
#include "storages.h"
#include "tiling.h"

namespace headrace {

namespace {

constexpr isize STEP = Int8Product::STEP;
struct Dots {
  static constexpr int TILE_ROWS = LANES == 16 ? 12 : 4;  // accumulators, a step of weights and a broadcast fill the registers
  static constexpr isize ROW_BLOCK = Int8Product::ROW_BLOCK;
  static constexpr isize NEAR_BYTES = 2048;               // how far ahead weights are called into L1,
  static constexpr isize FAR_BYTES = 16384;               // and into L2

  const Int8Product& product;

  // ROWS rows from m on by GROUPS panels from `panel` on.
  template <int ROWS, int GROUPS>
  void tile(isize panel, isize m) const {
    constexpr int VECS = GROUPS * TILE_VECS;
    const isize depth = product.depth, panel_bytes = depth / 4 * STEP;
    const std::int8_t* w = product.panel_at(panel);
    const std::uint8_t* a = product.bytes + m * depth;
    ivec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) sums[r][v] = int_zero();
    for (isize k = 0; k < depth; k += 4) {
      ivec weights[VECS];
      for (int g = 0; g < GROUPS; ++g) {
        const std::int8_t* step = w + g * panel_bytes + k / 4 * STEP;
        for (int v = 0; v < TILE_VECS; ++v) weights[g * TILE_VECS + v] = int_load(step + v * LANES * 4);
        for (isize line = 0; line < STEP; line += 64) {
          prefetch<3>(step + NEAR_BYTES + line);
          prefetch<2>(step + FAR_BYTES + line);
        }
      }
      for (int r = 0; r < ROWS; ++r) {
        const ivec four = broadcast_four(a + r * depth + k);
        for (int v = 0; v < VECS; ++v) sums[r][v] = dot4(sums[r][v], four, weights[v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) product.finish(m + r, panel * PANEL + v * LANES, sums[r][v]);
  }
};

void by_dots(const Int8Product& product, isize rows, isize from, isize to) { Tiling<Dots>::run(Dots{product}, rows, from, to); }

Int8Product product_of(const Matrix& matrix, const std::uint8_t* bytes, const float* row_scales, float* y, isize stride) {
  return {static_cast<const std::int8_t*>(matrix.panels), matrix.bias, matrix.scales, matrix.compensation,
          matrix.columns, byte_stride(matrix.depth), bytes, row_scales, y, stride};
}

// From how many rows on tiles are the faster ones, by measurement.
constexpr isize ROWS_FOR_TILES = 4;

}  // namespace

void int8_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to) {
  const Int8Product product = product_of(matrix, operand.bytes, operand.scales, y, stride);
  if (rows >= ROWS_FOR_TILES && has_tiles())
    int8_by_tiles(product, rows, from, to);
  else
    by_dots(product, rows, from, to);
}

namespace {

// Where weight k of column c stands within a panel.
isize place(isize k, isize c) { return k / 4 * STEP + c * 4 + k % 4; }

// Rounds a column to bytes: out[k] = round(weight[k] / scale) for the largest magnitude at 127. Returns the scale that,
// times the bytes, comes nearest to the weights.
float round_column(const float* weight, isize depth, std::int8_t* out) {
  float most = 0.0f;
  for (isize k = 0; k < depth; ++k) most = std::max(most, std::fabs(weight[k]));
  if (most < 1e-30f) {
    std::fill_n(out, depth, std::int8_t{0});
    return 0.0f;
  }
  const float factor = 127.0f / most;
  double along = 0.0, squares = 0.0;
  for (isize k = 0; k < depth; ++k) {
    const float rounded = std::nearbyint(weight[k] * factor);
    out[k] = static_cast<std::int8_t>(rounded);
    along += static_cast<double>(rounded) * weight[k];
    squares += static_cast<double>(rounded) * rounded;
  }
  return static_cast<float>(along / squares);
}

}  // namespace

void int8_pack(const Matrix& matrix, const float* weight, int threads) {
  const isize columns = matrix.columns, depth = matrix.depth, panel_bytes = byte_stride(depth) / 4 * STEP;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize panel = 0; panel < panel_count(columns); ++panel) {
    std::int8_t* to = static_cast<std::int8_t*>(matrix.panels) + panel * panel_bytes;
    std::fill_n(to, panel_bytes, std::int8_t{0});
    std::unique_ptr<std::int8_t[]> rounded(new std::int8_t[depth]);
    for (isize c = 0; c < PANEL; ++c) {
      const isize column = panel * PANEL + c;
      std::int32_t sum = 0;
      float scale = 0.0f;
      if (column < columns) {
        scale = round_column(weight + column * depth, depth, rounded.get());
        for (isize k = 0; k < depth; ++k) {
          to[place(k, c)] = rounded[k];
          sum += rounded[k];
        }
      }
      matrix.scales[column] = scale;
      matrix.compensation[column] = 128 * sum;
    }
  }
}

void int8_unpack(const Matrix& matrix, float* weight, int threads) {
  const isize depth = matrix.depth, panel_bytes = byte_stride(depth) / 4 * STEP;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize column = 0; column < matrix.columns; ++column) {
    const std::int8_t* from = static_cast<const std::int8_t*>(matrix.panels) + column / PANEL * panel_bytes;
    for (isize k = 0; k < depth; ++k) weight[column * depth + k] = from[place(k, column % PANEL)] * matrix.scales[column];
  }
}

}  // namespace headrace

using namespace headrace;

extern "C" {

int headrace_has_tiles(void) { return has_tiles(); }

// As headrace_matmul by one thread over rows already quantised, by tiles (where there are) or by dot products: for comparing them.
void headrace_int8_matmul(const Matrix* matrix, const std::uint8_t* bytes, const float* row_scales, std::int64_t rows, float* y,
                          int tiles) {
  const Int8Product product = product_of(*matrix, bytes, row_scales, y, matrix->columns);
  (tiles && has_tiles() ? int8_by_tiles : by_dots)(product, rows, 0, panel_count(matrix->columns));
}

}  // extern "C"
