// Codes of keys by the nearest centroid, and items sorted by their joint code.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "sketch.h"

namespace headrace {

namespace {

float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// VECS vectors of products from `out` on.
template <int VECS>
void product_block(const float* x, const float* centroids, isize run, isize width, float* out) {
  vec sums[VECS];
  for (vec& sum : sums) sum = zero();
  for (isize d = 0; d < run; ++d, centroids += width) {
    const vec factor = broadcast(x[d]);
    for (int v = 0; v < VECS; ++v) sums[v] = fma(factor, load(centroids + v * LANES), sums[v]);
  }
  for (int v = 0; v < VECS; ++v) store(out + v * LANES, sums[v]);
}

}  // namespace

const float* float_row(const Context& context, bool value, std::int32_t row, isize head, float* room) {
  const isize at = row * context.token_stride + head * context.head_stride;
  const void* plane = value ? context.values : context.keys;
  if (context.storage == 0) return static_cast<const float*>(plane) + at;
  if (context.storage == 1) {
    const auto* from = static_cast<const std::uint16_t*>(plane) + at;
    for (isize d = 0; d < context.size; ++d) room[d] = from_bfloat16(from[d]);
  } else {
    const auto* from = static_cast<const std::int8_t*>(plane) + at;
    const float scale = (value ? context.value_scales : context.key_scales)[row * context.heads + head];
    for (isize d = 0; d < context.size; ++d) room[d] = static_cast<float>(from[d]) * scale;
  }
  return room;
}

void prefetch_row(const Context& context, bool value, std::int32_t row, isize head) {
  static constexpr isize BYTES[] = {4, 2, 1};
  const isize bytes = BYTES[context.storage], at = row * context.token_stride + head * context.head_stride;
  const char* from = static_cast<const char*>(value ? context.values : context.keys) + at * bytes;
  for (isize line = 0; line < context.size * bytes; line += 64) prefetch<2>(from + line);
}

isize nearest(const float* products, const float* half, isize width) {
  constexpr isize STEP = 16;
  float best[STEP];
  std::int32_t at[STEP];
  for (isize i = 0; i < STEP; ++i) best[i] = -std::numeric_limits<float>::infinity(), at[i] = 0;
  for (isize c = 0; c < width; c += STEP)
    for (isize i = 0; i < STEP; ++i) {
      const float score = products[c + i] - half[c + i];
      at[i] = score > best[i] ? static_cast<std::int32_t>(c) : at[i];
      best[i] = score > best[i] ? score : best[i];
    }
  isize found = 0;
  for (isize i = 1; i < STEP; ++i)
    if (best[i] > best[found] || (best[i] == best[found] && at[i] + i < at[found] + found)) found = i;
  return at[found] + found;
}

void centroid_products(const float* x, const float* centroids, isize run, isize width, float* out) {
  isize c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) product_block<4>(x, centroids + c, run, width, out + c);
  for (; c < width; c += LANES) product_block<1>(x, centroids + c, run, width, out + c);
}

void code_items(const Sketch& sketch, const Context& context, isize initial, isize head, isize first, isize last, bool counted) {
  const isize run = context.size / sketch.subspaces, width = sketch.width;
  const float* centroids = sketch.centroids + head * sketch.subspaces * run * width;
  const float* half = sketch.half + head * sketch.subspaces * width;
  std::vector<float> room(static_cast<std::size_t>(context.size + width));
  float* products = room.data() + context.size;
  for (isize item = first; item < last; ++item) {
    const float* key = float_row(context, false, row_of(context, initial + item), head, room.data());
    std::uint32_t cell = 0;
    for (isize m = 0; m < sketch.subspaces; ++m) {
      centroid_products(key + m * run, centroids + m * run * width, run, width, products);
      const isize code = nearest(products, half + m * width, width);
      if (sketch.cells == nullptr)
        sketch.codes[(head * sketch.subspaces + m) * sketch.capacity + item] = static_cast<std::uint8_t>(code);
      else
        cell |= static_cast<std::uint32_t>(code) << (sketch.bits * m);
    }
    if (sketch.cells == nullptr) continue;
    sketch.cells[head * sketch.capacity + item] = static_cast<std::uint16_t>(cell);
    if (counted && item >= sketch.skip) ++sketch.counts[(head << (sketch.bits * sketch.subspaces)) + cell];
  }
}

void sort_items(const Sketch& sketch, isize head, isize length) {
  const isize cells = isize{1} << (sketch.bits * sketch.subspaces);
  const std::uint16_t* cell = sketch.cells + head * sketch.capacity;
  std::int32_t *order = sketch.order + head * sketch.capacity, *starts = sketch.starts + head * cells;
  std::int32_t *ends = sketch.ends + head * cells, *counts = sketch.counts + head * cells;
  std::fill_n(counts, cells, 0);
  for (isize item = sketch.skip; item < length; ++item) ++counts[cell[item]];
  std::int32_t at = 0;
  for (isize c = 0; c < cells; ++c) {
    starts[c] = ends[c] = at;
    at += counts[c];
  }
  for (isize item = sketch.skip; item < length; ++item) order[ends[cell[item]]++] = static_cast<std::int32_t>(item);
}

}  // namespace headrace
