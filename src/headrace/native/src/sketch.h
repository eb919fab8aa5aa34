// Searching a product-quantised sketch of keys and attending to the rows that it points at, for decode steps over long contexts.
//
// A sketch has codes for the middle tokens of one sequence in one layer, for every K/V head: item i is the context's token initial + i.
// Codes of up to 14 bits in all are kept as joint cells, sorted by cell, so that scores, softmax and group sum cost the same at any
// length; longer codes are scanned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace headrace {

using isize = std::ptrdiff_t;

constexpr isize QUADS = 4;  // queries that share a pass over keys

// The structs below are described by their owner: those of the same names in sketch.py.

// Where K and V of a context live. Token t is row slots[t], or row t where `slots` is null; rows and heads are strides apart.
struct Context {
  const void *keys, *values;
  const float *key_scales, *value_scales;  // [rows, heads] of int8 codes, null for others
  const std::int32_t* slots;
  std::int64_t token_stride, head_stride;  // in elements
  std::int64_t storage;                    // 0 float32, 1 bfloat16, 2 int8
  std::int64_t heads, size;                // K/V heads and their dimensions
};

struct Sketch {
  const float* centroids;  // [heads, subspaces, size / subspaces, width]
  const float* half;       // [heads, subspaces, width]: |z|^2 / 2, infinite where there is no centroid
  std::uint8_t* codes;     // scanned: [heads, subspaces, capacity]
  std::uint16_t* cells;    // joint:   [heads, capacity]
  std::int32_t* order;     // joint:   [heads, capacity], sorted items of a cell at [starts, ends), oldest first
  std::int32_t *starts, *ends, *counts;  // joint: [heads, 1 << (subspaces * bits)]; counts has the unsorted items too
  std::int64_t subspaces, bits, width;   // width: centroids, rounded up to a multiple of 16
  std::int64_t capacity, length, sorted; // items there is room for, coded, and sorted
  std::int64_t skip;                     // items at the start that are padding
};

// One sequence's decode row, or its draft tree of several rows, in one layer.
struct Query {
  const Context* context;
  const Sketch* sketch;
  const float* queries;  // [rows, heads * group, size]
  float* out;            // alike
  std::int64_t rows, group;
  std::int64_t length;   // tokens of the context, own rows excluded
  std::int64_t initial, local;  // tokens [0, initial) and [local, length) are always attended
  std::int64_t least, most;     // items to retrieve
  float keep;            // share of the estimated attention to the middle that decides between them; 0: always `most`
  float scale;           // of scores
  std::int64_t fresh;    // items to code first: those behind the sketch's length
  std::int64_t resort;   // whether to sort all of them then
  float* value_sum;      // [heads, size] of the items' values, kept up to date; null without residual correction
  const std::int32_t* own;    // [rows] slots of the own rows
  const std::uint32_t* mask;  // [rows, ceil(rows / 32)] who sees whom among them; null: those before and itself
  std::int32_t* chosen;  // [heads, initial + most + length - local]: room for the rows attended to
  std::int32_t* found;   // [heads] how many of them
  float* logs;           // [heads, rows * group]: logarithm of the estimated weight left out, under residual correction
};

// One row as floats: in place, or through `room`.
const float* float_row(const Context& context, bool value, std::int32_t row, isize head, float* room);
void prefetch_row(const Context& context, bool value, std::int32_t row, isize head);
inline std::int32_t row_of(const Context& context, isize token) {
  return context.slots == nullptr ? static_cast<std::int32_t>(token) : context.slots[token];
}

// out[width] = the products of x[run] with all centroids of a sub-space.
void centroid_products(const float* x, const float* centroids, isize run, isize width, float* out);

// The first of the largest x z - |z|^2 / 2, so that |x|^2 need not be known.
isize nearest(const float* products, const float* half, isize width);

// Codes of items [first, last) of a head into codes or cells; `counted` adds them to the counts.
void code_items(const Sketch& sketch, const Context& context, isize initial, isize head, isize first, isize last, bool counted);
// Counting sort of a head's items [skip, length).
void sort_items(const Sketch& sketch, isize head, isize length);

// Items of a head with the largest estimated attention into `chosen`; returns how many.
isize search(const Query& query, isize head, isize length, isize sorted, std::int32_t* chosen);

// Attention of all rows of a head to `count` rows of the context, own ones last where `own`; leaves sums, maxima and totals.
struct Partial {
  float* sums;  // [rows * group, size]
  float* top;   // [rows * group]
  float* total;
};
void attend_part(const Query& query, isize head, const std::int32_t* rows, isize count, bool own, const Partial& partial);

}  // namespace headrace
