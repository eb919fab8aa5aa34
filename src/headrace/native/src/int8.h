// An int8 product as its kernels see it; int8_product.cpp says what it computes and how panels are laid out.
#pragma once

#include "bytes.h"
#include "product.h"

namespace headrace {

struct Int8Product {
  static constexpr isize STEP = PANEL * 4;  // bytes of a step of a panel
  static constexpr isize ROW_BLOCK = 256;   // rows whose bytes stay in L2 while all panels pass over them

  const std::int8_t* panels;
  const float *bias, *scales;
  const std::int32_t* compensation;
  isize columns, depth;  // depth in bytes, a multiple of 64
  const std::uint8_t* bytes;
  const float* row_scales;
  float* y;
  isize ldy;

  const std::int8_t* panel_at(isize panel) const { return panels + panel * (depth / 4 * STEP); }

  // LANES integer sums of row m, from `column` on, become outputs; columns beyond N are dropped.
  void finish(isize m, isize column, ivec sums) const {
    const vec factor = multiply(load(scales + column), broadcast(row_scales[m]));
    const vec out = fma(to_float(int_subtract(sums, int_load(compensation + column))), factor, load(bias + column));
    store_some(y + m * ldy + column, out, columns - column);
  }
};

// Whether this machine and process have matrix tiles.
bool has_tiles();

// Panels [from, to) by matrix tiles; only where has_tiles().
void int8_by_tiles(const Int8Product& product, isize rows, isize from, isize to);

}  // namespace headrace
