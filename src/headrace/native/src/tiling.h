// How products whose tiles walk all of K pass over rows and panels.
#pragma once

#include <algorithm>
#include <utility>

#include "product.h"

namespace headrace {

// Independent sums that hide an instruction's latency: tiles of few rows take several panels at once.
constexpr int CHAINS = 8;
constexpr int panels_at_once(int rows) { return std::max(1, CHAINS / (rows * TILE_VECS)); }

// Rows of the next tile, of at most `most`, when `left` remain: even shares, so that no tile is left with a single row to itself.
inline int next_rows(isize left, int most) {
  const isize tiles = (left + most - 1) / most;
  return static_cast<int>((left + tiles - 1) / tiles);
}

// kernel.tile<ROWS, GROUPS>(panel, m) for ROWS rows from m on by GROUPS panels from `panel` on, ROWS from 1 to Kernel::TILE_ROWS,
// so that panels [from, to) of all rows are computed. A panel stays in the cache while Kernel::ROW_BLOCK rows pass over it.
template <typename Kernel>
class Tiling {
 public:
  static void run(const Kernel& kernel, isize rows, isize from, isize to) {
    for (isize first = 0; first < rows; first += Kernel::ROW_BLOCK) {
      const isize last = std::min(rows, first + Kernel::ROW_BLOCK);
      const int most = panels_at_once(next_rows(last - first, Kernel::TILE_ROWS));
      for (isize panel = from; panel < to;) {
        const int groups = to - panel >= most ? most : 1;
        for (isize m = first; m < last;) {
          const int tile_rows = next_rows(last - m, Kernel::TILE_ROWS);
          function(tile_rows, groups > 1)(kernel, panel, m);
          m += tile_rows;
        }
        panel += groups;
      }
    }
  }

 private:
  using Function = void (*)(const Kernel&, isize, isize);

  template <int ROWS, int GROUPS>
  static void tile(const Kernel& kernel, isize panel, isize m) {
    kernel.template tile<ROWS, GROUPS>(panel, m);
  }
  template <bool WIDE, int... R>
  static Function pick(int rows, std::integer_sequence<int, R...>) {
    static constexpr Function functions[] = {&tile<R + 1, WIDE ? panels_at_once(R + 1) : 1>...};
    return functions[rows - 1];
  }
  static Function function(int rows, bool wide) {
    using Rows = std::make_integer_sequence<int, Kernel::TILE_ROWS>;
    return wide ? pick<true>(rows, Rows{}) : pick<false>(rows, Rows{});
  }
};

}  // namespace headrace
