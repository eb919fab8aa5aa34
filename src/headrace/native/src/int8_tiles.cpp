// int8 products by Intel's matrix tiles (AMX): 16 rows by 64 bytes of activations times 64 bytes by 16 columns of weights.
#include <algorithm>

#include "amx.h"
#include "int8.h"

namespace headrace {

#ifdef HEADRACE_AMX

static_assert(PANEL == 32, "a panel is two tiles wide");

bool has_tiles() { return may_use_tiles(); }

namespace {

// Rows [m, m + height) come as one tile of activations, or as two of them, the second of `height - upper` rows.
struct Blocks {
  isize rows, height, count;
  int upper;

  // Even shares of at most 32 rows. Blocks are of one height, for which tiles are set up once; the last one begins early
  // enough to be full, and computes some rows again.
  explicit Blocks(isize rows) : rows(rows) {
    count = (rows + 31) / 32;
    height = (rows + count - 1) / count;
    upper = static_cast<int>(height <= 16 ? height : (height + 1) / 2);
  }
  bool single() const { return upper == height; }
  isize start(isize block) const { return std::min(block * height, rows - height); }

  TileConfig config() const {
    TileConfig config;
    const int lower = static_cast<int>(height) - upper;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, tile < 2 || single() ? upper : lower);
    config.set(4, upper);
    config.set(5, single() ? 16 : lower);
    config.set(6, 16);
    config.set(7, 16);
    return config;
  }
};

constexpr isize STEP = Int8Product::STEP;
constexpr isize TILE_BYTES = 16 * STEP;  // 64 k of a panel

// How far ahead weights that come from memory are called into L1 and L2. Tiles are loaded a cache line per row, in bursts, and
// the processor's own prefetching does not keep up with them.
constexpr isize NEAR_BYTES = 4096, FAR_BYTES = 16384;

inline void prefetch_ahead(const std::int8_t* w) {
  for (isize line = 0; line < TILE_BYTES; line += 64) {
    prefetch<3>(w + NEAR_BYTES + line);
    prefetch<2>(w + FAR_BYTES + line);
  }
}

void finish(const Int8Product& product, const std::int32_t* sums, isize m, int rows, isize panel, int vecs) {
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vecs; ++v)
      product.finish(m + r, panel * PANEL + v * LANES, int_load(sums + (r * vecs + v) * LANES));
}

// Two tiles of rows by a panel. Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. FIRST: the first rows to meet this
// panel, which comes from memory; for the following ones it is in the cache.
template <bool FIRST>
void two_by_two(const Int8Product& product, isize panel, isize m, int upper, int height) {
  const isize depth = product.depth;
  const std::uint8_t *a = product.bytes + m * depth, *below = a + upper * depth;
  const std::int8_t* w = product.panel_at(panel);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (isize k = 0; k < depth; k += 64, w += TILE_BYTES) {
    _tile_loadd(6, w, STEP);
    _tile_loadd(4, a + k, depth);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + 64, STEP);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, below + k, depth);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    if (FIRST) prefetch_ahead(w);

  }
  alignas(64) std::int32_t sums[32 * PANEL];
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + 16, PANEL * 4);
  _tile_stored(2, sums + upper * PANEL, PANEL * 4);
  _tile_stored(3, sums + upper * PANEL + 16, PANEL * 4);
  finish(product, sums, m, height, panel, 2);
}

// One tile of rows by two panels, so that four sums are under way.
void one_by_four(const Int8Product& product, isize panel, isize m, int rows) {
  const isize depth = product.depth;
  const std::uint8_t* a = product.bytes + m * depth;
  const std::int8_t *w = product.panel_at(panel), *next = product.panel_at(panel + 1);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (isize k = 0; k < depth; k += 64, w += TILE_BYTES, next += TILE_BYTES) {
    _tile_loadd(4, a + k, depth);
    _tile_loadd(5, w, STEP);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, w + 64, STEP);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, next, STEP);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, next + 64, STEP);
    _tile_dpbusd(3, 4, 5);
    prefetch_ahead(w);
    prefetch_ahead(next);


  }
  alignas(64) std::int32_t sums[16 * 2 * PANEL];
  _tile_stored(0, sums, PANEL * 8);
  _tile_stored(1, sums + 16, PANEL * 8);
  _tile_stored(2, sums + 32, PANEL * 8);
  _tile_stored(3, sums + 48, PANEL * 8);
  finish(product, sums, m, rows, panel, 4);
}

// One tile of rows by the panel that is left over.
void one_by_two(const Int8Product& product, isize panel, isize m, int rows) {
  const isize depth = product.depth;
  const std::uint8_t* a = product.bytes + m * depth;
  const std::int8_t* w = product.panel_at(panel);
  _tile_zero(0);
  _tile_zero(1);
  for (isize k = 0; k < depth; k += 64, w += TILE_BYTES) {
    _tile_loadd(4, a + k, depth);
    _tile_loadd(6, w, STEP);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + 64, STEP);
    _tile_dpbusd(1, 4, 7);
  }
  alignas(64) std::int32_t sums[16 * PANEL];
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + 16, PANEL * 4);
  finish(product, sums, m, rows, panel, 2);
}

}  // namespace

void int8_by_tiles(const Int8Product& product, isize rows, isize from, isize to) {
  const Blocks blocks(rows);
  const TileConfig config = blocks.config();
  publish(&config);
  _tile_loadconfig(&config);
  if (blocks.single()) {
    isize panel = from;
    for (; panel + 2 <= to; panel += 2) one_by_four(product, panel, 0, blocks.upper);
    for (; panel < to; ++panel) one_by_two(product, panel, 0, blocks.upper);
  } else {
    constexpr isize TOGETHER = Int8Product::ROW_BLOCK / 32;
    for (isize first = 0; first < blocks.count; first += TOGETHER)
      for (isize panel = from; panel < to; ++panel)
        for (isize block = first; block < std::min(blocks.count, first + TOGETHER); ++block)
          (block == first ? two_by_two<true> : two_by_two<false>)(product, panel, blocks.start(block), blocks.upper,
                                                                  static_cast<int>(blocks.height));
  }
  _tile_release();
}

#else

bool has_tiles() { return false; }

void int8_by_tiles(const Int8Product&, isize, isize, isize) {}

#endif

}  // namespace headrace
