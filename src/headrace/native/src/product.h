// y[M, N] = x[M, K] @ W[N, K]^T + bias over weights packed once: the seam between the products and whoever calls them.
//
// A packed matrix is cut into panels of PANEL output columns. product_share() computes one thread's panels and meets no other
// thread, so that it may be called by every member of any OpenMP team; the caller sees to it that the operand is complete before
// and places a barrier behind. Quantised storages (quantises() says which) want the rows of x as bytes: see quantise_row().
//
// Whatever the storage, a row of y depends on the same row of x alone, in bits: not on the other rows, their number or the team.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace headrace {

using isize = std::ptrdiff_t;

constexpr int TILE_VECS = (LANES == 4 && REGISTERS == 32) ? 4 : 2;
constexpr int PANEL = TILE_VECS * LANES;

// How weights are stored; the codes of skinny.py.
enum Storage : std::int64_t {
  FLOAT32 = 0,
  BFLOAT16 = 1,  // values that are exactly bf16, widened in registers
  INT8 = 2,      // one scale per column, products in integers
  NF4 = 3,       // 4-bit levels with a scale per 64 weights, products in fp32
};

// A packed matrix as its owner describes it: the struct of the same name in skinny.py.
struct Matrix {
  void* panels;                // panel_count(columns) panels, laid out as the storage wants
  const float* bias;           // [panel_count(columns) * PANEL], zeros where there is none
  float* scales;               // int8: [panel_count(columns) * PANEL]; else null
  std::int32_t* compensation;  // int8: [panel_count(columns) * PANEL]; else null
  std::int64_t columns;        // N
  std::int64_t depth;          // K
  std::int64_t storage;
};

inline isize panel_count(isize columns) { return (columns + PANEL - 1) / PANEL; }

// The rows of x. `bytes` and `scales` are read where quantises(matrix), `x` elsewhere; what is not read may be null.
struct Operand {
  const float* x;             // [rows, K], contiguous columns
  isize stride;               // floats from one row of x to the next
  const std::uint8_t* bytes;  // [rows, byte_stride(K)], by quantise_row()
  const float* scales;        // [rows], by quantise_row()
};

// Whether products with this matrix want bytes.
inline bool quantises(const Matrix& matrix) { return matrix.storage == INT8; }

// Bytes from one quantised row to the next: K rounded up to a multiple of 64. Rows start at multiples of 64 for speed.
inline isize byte_stride(isize depth) { return (depth + 63) / 64 * 64; }

// One row as bytes: round(x / scale) + 128 with scale = max|x| / 127, and 128, which stands for zero, from K to byte_stride(K).
// A row that holds a NaN or an infinity gets a scale of NaN, and so gives NaNs.
void quantise_row(const float* x, isize depth, std::uint8_t* bytes, float* scale);

// Member `rank`'s share, of `size`, of y[rows, N] = x @ W^T + bias. Rows of y are `stride` floats apart.
void product_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize rank, isize size);

}  // namespace headrace
