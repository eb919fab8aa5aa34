// Products in fp32 over weights stored as NormalFloat-4 (Dettmers et al., QLoRA, 2023): blocks of BLOCK weights along K, each an
// index into 16 levels times the block's largest magnitude, which is kept as bf16. 4.25 bits a weight.
//
// Layout. A panel holds the blocks of its columns one behind the other: BLOCK / 8 steps of PANEL 32-bit words, each with eight
// consecutive k of a column from the low bits up, then PANEL scales, placed as bf16 weights are. Columns beyond N have a scale of
// zero, weights beyond K are zeros.
//
// Order of summation. Within a block one chain of multiply-adds over levels in ascending k, then total + scale * block, the total
// being the bias at first. Nothing else enters into it: a row's bits do not depend on the rows it shares a batch with.
#include <cmath>
#include <cstring>

#include "storages.h"
#include "tiling.h"

namespace headrace {

namespace {

constexpr isize BLOCK = 64;
constexpr isize WORD = 8;  // weights per 32-bit word
constexpr isize WORD_BYTES = BLOCK / WORD * PANEL * 4;
constexpr isize BLOCK_BYTES = WORD_BYTES + PANEL * 2;
constexpr int ZERO_LEVEL = 7;

// Quantiles of the normal distribution scaled to [-1, 1], zero among them: the values bitsandbytes uses.
alignas(64) constexpr float LEVELS[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

isize block_count(isize depth) { return (depth + BLOCK - 1) / BLOCK; }

struct Nf4Product {
  static constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;
  static constexpr isize ROW_BLOCK = 128;     // rows of x that stay in L2 while all panels pass over them
  static constexpr isize NEAR_BYTES = 2048;   // how far ahead weights are called into L1,
  static constexpr isize FAR_BYTES = 16384;   // and into L2

  const std::uint8_t* panels;
  const float* bias;
  isize columns, depth;
  const float* x;
  isize ldx;
  float* y;
  isize ldy;

  const std::uint8_t* panel_at(isize panel) const { return panels + panel * block_count(depth) * BLOCK_BYTES; }

  // Adds one block to the totals. x: ROWS rows of BLOCK values.
  template <int ROWS, int GROUPS>
  static void add_block(const std::uint8_t* block, isize panel_bytes, const float* x, isize ldx,
                        vec (&totals)[ROWS][GROUPS * TILE_VECS]) {
    constexpr int VECS = GROUPS * TILE_VECS;
    const Levels levels(LEVELS);
    vec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) sums[r][v] = zero();
    for (isize step = 0; step < BLOCK / WORD; ++step) {
      Levels::Words words[VECS];
      for (int g = 0; g < GROUPS; ++g) {
        const std::uint8_t* at = block + g * panel_bytes + step * PANEL * 4;
        for (int v = 0; v < TILE_VECS; ++v) words[g * TILE_VECS + v] = Levels::words(at + v * LANES * 4);
        for (isize line = 0; line < PANEL * 4; line += 64) {
          prefetch<3>(at + NEAR_BYTES + line);
          prefetch<2>(at + FAR_BYTES + line);
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < WORD; ++k) {
        vec weights[VECS];
        for (int v = 0; v < VECS; ++v) weights[v] = levels.pick(words[v], 4 * k);
        for (int r = 0; r < ROWS; ++r) {
          const vec value = broadcast(x[r * ldx + step * WORD + k]);
          for (int v = 0; v < VECS; ++v) sums[r][v] = fma(value, weights[v], sums[r][v]);
        }
      }
    }
    for (int g = 0; g < GROUPS; ++g)
      for (int v = 0; v < TILE_VECS; v += 2) {
        vec low, high;
        load_pair(reinterpret_cast<const std::uint16_t*>(block + g * panel_bytes + WORD_BYTES) + v * LANES, low, high);
        for (int r = 0; r < ROWS; ++r) {
          const int at = g * TILE_VECS + v;
          totals[r][at] = fma(low, sums[r][at], totals[r][at]);
          totals[r][at + 1] = fma(high, sums[r][at + 1], totals[r][at + 1]);
        }
      }
  }

  // ROWS rows from m on by GROUPS panels from `panel` on.
  template <int ROWS, int GROUPS>
  void tile(isize panel, isize m) const {
    constexpr int VECS = GROUPS * TILE_VECS;
    const isize panel_bytes = block_count(depth) * BLOCK_BYTES, whole = depth / BLOCK * BLOCK;
    const std::uint8_t* block = panel_at(panel);
    const float* from = x + m * ldx;
    vec totals[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) totals[r][v] = load(bias + panel * PANEL + v * LANES);
    for (isize k = 0; k < whole; k += BLOCK, block += BLOCK_BYTES)
      add_block<ROWS, GROUPS>(block, panel_bytes, from + k, ldx, totals);
    if (whole < depth) {
      float last[ROWS * BLOCK] = {};
      for (int r = 0; r < ROWS; ++r) std::copy_n(from + r * ldx + whole, depth - whole, last + r * BLOCK);
      add_block<ROWS, GROUPS>(block, panel_bytes, last, BLOCK, totals);
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) {
        const isize column = panel * PANEL + v * LANES;
        store_some(y + (m + r) * ldy + column, totals[r][v], columns - column);
      }
  }
};

float widen(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// The nearest finite bf16 of a finite magnitude, ties to even.
std::uint16_t narrow(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<std::uint16_t>(std::min((word + 0x7fffu + (word >> 16 & 1u)) >> 16, 0x7f7fu));
}

int nearest_level(float value) {
  int level = 0;
  for (int next = 1; next < 16; ++next) level += value > (LEVELS[next - 1] + LEVELS[next]) * 0.5f;
  return level;
}

// Where the scale of column c of a panel stands: columns c and c + LANES share a 32-bit word.
isize scale_place(isize c) {
  const isize pair = c / (2 * LANES) * (2 * LANES), within = c % (2 * LANES);
  return pair + within % LANES * 2 + within / LANES;
}

std::uint16_t* scales_of(std::uint8_t* block) { return reinterpret_cast<std::uint16_t*>(block + WORD_BYTES); }

// Block `block` of a panel takes `count` weights of column c.
void pack_block(const float* weight, isize count, std::uint8_t* block, isize c) {
  float most = 0.0f;
  for (isize k = 0; k < count; ++k) most = std::max(most, std::fabs(weight[k]));
  const std::uint16_t bits = narrow(most);
  scales_of(block)[scale_place(c)] = bits;
  const float scale = widen(bits);
  for (isize step = 0; step < BLOCK / WORD; ++step) {
    std::uint32_t word = 0;
    for (isize i = 0; i < WORD; ++i) {
      const isize k = step * WORD + i;
      const int level = k < count && scale > 0.0f ? nearest_level(weight[k] / scale) : ZERO_LEVEL;
      word |= static_cast<std::uint32_t>(level) << (4 * i);
    }
    std::memcpy(block + (step * PANEL + c) * 4, &word, sizeof word);
  }
}

}  // namespace

void nf4_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to) {
  const Nf4Product product{static_cast<const std::uint8_t*>(matrix.panels), matrix.bias, matrix.columns, matrix.depth,
                           operand.x, operand.stride, y, stride};
  Tiling<Nf4Product>::run(product, rows, from, to);
}

isize nf4_bytes(isize columns, isize depth) { return panel_count(columns) * block_count(depth) * BLOCK_BYTES; }

void nf4_pack(const Matrix& matrix, const float* weight, int threads) {
  const isize columns = matrix.columns, depth = matrix.depth, blocks = block_count(depth);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize panel = 0; panel < panel_count(columns); ++panel)
    for (isize c = 0; c < PANEL; ++c)
      for (isize b = 0; b < blocks; ++b) {
        const isize column = panel * PANEL + c, count = column < columns ? std::min(BLOCK, depth - b * BLOCK) : 0;
        const float* from = count ? weight + column * depth + b * BLOCK : nullptr;
        pack_block(from, count, static_cast<std::uint8_t*>(matrix.panels) + (panel * blocks + b) * BLOCK_BYTES, c);
      }
}

void nf4_unpack(const Matrix& matrix, float* weight, int threads) {
  const isize depth = matrix.depth, blocks = block_count(depth);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize column = 0; column < matrix.columns; ++column)
    for (isize k = 0; k < depth; ++k) {
      std::uint8_t* block = static_cast<std::uint8_t*>(matrix.panels) + (column / PANEL * blocks + k / BLOCK) * BLOCK_BYTES;
      std::uint32_t word;
      std::memcpy(&word, block + (k % BLOCK / WORD * PANEL + column % PANEL) * 4, sizeof word);
      weight[column * depth + k] = LEVELS[word >> (4 * (k % WORD)) & 15u] * widen(scales_of(block)[scale_place(column % PANEL)]);
    }
}

}  // namespace headrace
