// Products in fp32 over weights stored as float32 or bfloat16; built for few rows, sound for any.
//
// Layout. A panel holds K steps of PANEL weights back to back, so a product reads every weight once and in order. bf16
// storage halves the bytes and is widened in registers: the arithmetic is fp32 either way. Columns beyond N are zeros.
//
// Order of summation. Each y[m, n] walks K in blocks of K_BLOCK: within a block one chain of multiply-adds in ascending k,
// then base + block, base being the bias at first and the running sum afterwards. No tile shape, thread count or number of
// rows enters into it: a row's bits do not depend on the rows it shares a batch with.
//
// Rows are tiled so that a tile's accumulators fill the registers, and a panel's K block stays in cache while all row tiles
// of a row block pass over it. Threads split the panels.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "storages.h"
#include "tiling.h"

namespace headrace {

namespace {

constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;  // accumulators, a step of weights and a broadcast fill the registers
constexpr isize K_BLOCK = 256;                   // a panel's block and a tile's rows fit a 48 KiB L1
constexpr isize ROW_BLOCK = 128;                 // rows of x that stay in L2 while all panels pass over them
constexpr isize COPIED_ROWS = 64;                // rows of x copied apart at a time
constexpr isize COLLIDING = 512;                 // strides, in floats, at which the rows of a tile compete for a few sets of L1
constexpr isize NEAR_BYTES = 1024;               // how far ahead weights are called into L1,
constexpr isize FAR_BYTES = 16384;               // and into L2

// Adds `depth` steps of k to ROWS x (GROUPS * PANEL) outputs: y = base + x @ w. Group g reads weights at w + g * group_stride.
template <int ROWS, int GROUPS, typename W>
inline void tile(const W* w, isize group_stride, const float* x, isize ldx, isize depth, const float* base, isize ldbase,
                 float* y, isize ldy) {
  constexpr int VECS = GROUPS * TILE_VECS;
  vec acc[ROWS][VECS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECS; ++v) acc[r][v] = zero();
#pragma GCC unroll 4
  for (isize k = 0; k < depth; ++k) {
    vec weights[VECS];
    for (int g = 0; g < GROUPS; ++g) {
      const W* step = w + g * group_stride + k * PANEL;
      for (int v = 0; v < TILE_VECS; v += 2)
        load_pair(step + v * LANES, weights[g * TILE_VECS + v], weights[g * TILE_VECS + v + 1]);
      for (std::size_t line = 0; line < PANEL * sizeof(W); line += 64) {
        prefetch<3>(reinterpret_cast<const char*>(step) + NEAR_BYTES + line);
        prefetch<2>(reinterpret_cast<const char*>(step) + FAR_BYTES + line);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const vec value = broadcast(x[r * ldx + k]);
      for (int v = 0; v < VECS; ++v) acc[r][v] = fma(value, weights[v], acc[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECS; ++v) {
      const isize at = v * LANES;
      store(y + r * ldy + at, add(load(base + r * ldbase + at), acc[r][v]));
    }
}

template <typename W>
using TileFunction = void (*)(const W*, isize, const float*, isize, isize, const float*, isize, float*, isize);

// tiles[rows - 1], for the most panels such a tile takes at once, or for a single one.
template <typename W, bool WIDE, int... R>
constexpr TileFunction<W> pick(int rows, std::integer_sequence<int, R...>) {
  constexpr TileFunction<W> tiles[] = {tile<R + 1, WIDE ? panels_at_once(R + 1) : 1, W>...};
  return tiles[rows - 1];
}
template <typename W>
TileFunction<W> tile_for(int rows, bool wide) {
  using Rows = std::make_integer_sequence<int, TILE_ROWS>;
  return wide ? pick<W, true>(rows, Rows{}) : pick<W, false>(rows, Rows{});
}

template <typename W>
struct Product {
  const W* panels;
  const float* bias;
  isize columns, depth;
  const float* x;
  isize ldx;
  float* y;
  isize ldy, rows;

  // `groups` whole panels from `panel` on, for rows [first, last).
  void whole(isize panel, int groups, isize first, isize last) const {
    const W* w = panels + panel * depth * PANEL;
    float* out = y + panel * PANEL;
    for (isize k = 0; k < depth; k += K_BLOCK) {
      const isize steps = std::min(K_BLOCK, depth - k);
      for (isize m = first; m < last;) {
        const int tile_rows = next_rows(last - m, TILE_ROWS);
        float* to = out + m * ldy;
        tile_for<W>(tile_rows, groups > 1)(w + k * PANEL, depth * PANEL, x + m * ldx + k, ldx, steps,
                                           k == 0 ? bias + panel * PANEL : to, k == 0 ? 0 : ldy, to, ldy);
        m += tile_rows;
      }
    }
  }

  // The last panel when it has columns beyond N: computed aside, the real columns copied.
  void partial(isize panel, isize first, isize last) const {
    const W* w = panels + panel * depth * PANEL;
    const isize real = columns - panel * PANEL;
    alignas(64) float aside[TILE_ROWS * PANEL];
    for (isize m = first; m < last;) {
      const int tile_rows = next_rows(last - m, TILE_ROWS);
      for (isize k = 0; k < depth; k += K_BLOCK)
        tile_for<W>(tile_rows, false)(w + k * PANEL, 0, x + m * ldx + k, ldx, std::min(K_BLOCK, depth - k),
                                      k == 0 ? bias + panel * PANEL : aside, k == 0 ? 0 : PANEL, aside, PANEL);
      for (int r = 0; r < tile_rows; ++r)
        std::copy_n(aside + r * PANEL, real, y + (m + r) * ldy + panel * PANEL);
      m += tile_rows;
    }
  }

  // Rows of x whose starts collide in the cache are copied apart, as many at a time as stay in L2.
  void run_apart(isize from, isize to) const {
    const isize stride = depth + 16, height = std::min(rows, COPIED_ROWS);
    const std::unique_ptr<float[]> copy(new float[height * stride]);
    for (isize first = 0; first < rows; first += height) {
      const isize some = std::min(height, rows - first);
      for (isize m = 0; m < some; ++m) std::copy_n(x + (first + m) * ldx, depth, copy.get() + m * stride);
      Product{panels, bias, columns, depth, copy.get(), stride, y + first * ldy, ldy, some}.run(from, to);
    }
  }

  void run(isize from, isize to) const {
    if (rows > TILE_ROWS && ldx % COLLIDING == 0) return run_apart(from, to);
    for (isize first = 0; first < rows; first += ROW_BLOCK) {
      const isize last = std::min(rows, first + ROW_BLOCK);
      const int most = panels_at_once(next_rows(last - first, TILE_ROWS));
      for (isize panel = from; panel < to;) {
        const isize whole_left = std::min(to, columns / PANEL) - panel;
        if (whole_left <= 0) {
          partial(panel++, first, last);
          continue;
        }
        const int groups = whole_left >= most ? most : 1;
        whole(panel, groups, first, last);
        panel += groups;
      }
    }
  }
};

// Where column c of a panel stands within a step of k. bf16 columns c and c + LANES share a 32-bit word.
template <typename W>
constexpr isize place(isize c) {
  if (sizeof(W) == sizeof(float)) return c;
  const isize pair = c / (2 * LANES) * (2 * LANES), within = c % (2 * LANES);
  return pair + within % LANES * 2 + within / LANES;
}

void convert(float from, float& to) { to = from; }
void convert(float from, std::uint16_t& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  to = static_cast<std::uint16_t>(bits >> 16);
}
void convert(std::uint16_t from, float& to) {
  const std::uint32_t bits = static_cast<std::uint32_t>(from) << 16;
  std::memcpy(&to, &bits, sizeof to);
}

template <typename W>
void pack(const float* weight, isize columns, isize depth, W* panels, int threads) {
  const isize count = panel_count(columns);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize panel = 0; panel < count; ++panel) {
    W* to = panels + panel * depth * PANEL;
    for (isize k = 0; k < depth; ++k)
      for (isize c = 0; c < PANEL; ++c) {
        const isize column = panel * PANEL + c;
        convert(column < columns ? weight[column * depth + k] : 0.0f, to[k * PANEL + place<W>(c)]);
      }
  }
}

template <typename W>
void unpack(const W* panels, isize columns, isize depth, float* weight, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize column = 0; column < columns; ++column) {
    const W* from = panels + column / PANEL * depth * PANEL + place<W>(column % PANEL);
    for (isize k = 0; k < depth; ++k) convert(from[k * PANEL], weight[column * depth + k]);
  }
}

template <typename W>
void share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to) {
  const W* panels = static_cast<const W*>(matrix.panels);
  Product<W>{panels, matrix.bias, matrix.columns, matrix.depth, operand.x, operand.stride, y, stride, rows}.run(from, to);
}

}  // namespace

void float_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to) {
  if (matrix.storage == BFLOAT16)
    share<std::uint16_t>(matrix, operand, rows, y, stride, from, to);
  else
    share<float>(matrix, operand, rows, y, stride, from, to);
}

void float_pack(const Matrix& matrix, const float* weight, int threads) {
  if (matrix.storage == BFLOAT16)
    pack(weight, matrix.columns, matrix.depth, static_cast<std::uint16_t*>(matrix.panels), threads);
  else
    pack(weight, matrix.columns, matrix.depth, static_cast<float*>(matrix.panels), threads);
}

void float_unpack(const Matrix& matrix, float* weight, int threads) {
  if (matrix.storage == BFLOAT16)
    unpack(static_cast<const std::uint16_t*>(matrix.panels), matrix.columns, matrix.depth, weight, threads);
  else
    unpack(static_cast<const float*>(matrix.panels), matrix.columns, matrix.depth, weight, threads);
}

}  // namespace headrace
