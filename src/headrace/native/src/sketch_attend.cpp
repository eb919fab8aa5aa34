// Exact attention over a list of rows, read where they lie: blocks of keys and an online softmax across them. Rows picked from all over a
// context are what a processor cannot foresee, so while it multiplies a block it is told of the next one's K and V.
#include <algorithm>
#include <vector>

#include "rows.h"
#include "sketch.h"

namespace headrace {

namespace {

constexpr isize BLOCK = 32;
constexpr float HIDDEN = -1e30f;

thread_local std::vector<float> memory;

// Products of four queries with a key.
void dot_quad(const float* const* queries, const float* key, isize size, float* out) {
  vec sums[QUADS];
  for (vec& sum : sums) sum = zero();
  isize d = 0;
  for (; d + LANES <= size; d += LANES) {
    const vec part = load(key + d);
    for (isize q = 0; q < QUADS; ++q) sums[q] = fma(part, load(queries[q] + d), sums[q]);
  }
  for (isize q = 0; q < QUADS; ++q) {
    out[q] = total(sums[q]);
    for (isize i = d; i < size; ++i) out[q] += queries[q][i] * key[i];
  }
}

// sums[q][d] += sum over keys of weights[q][key] * values[key][d], for VECS vectors from d on.
template <int VECS>
void add_values(const float* const* values, isize count, const float* weights, isize d, isize size, float* sums) {
  vec parts[QUADS][VECS];
  for (isize q = 0; q < QUADS; ++q)
    for (int v = 0; v < VECS; ++v) parts[q][v] = load(sums + q * size + d + v * LANES);
  for (isize t = 0; t < count; ++t) {
    vec row[VECS];
    for (int v = 0; v < VECS; ++v) row[v] = load(values[t] + d + v * LANES);
    for (isize q = 0; q < QUADS; ++q) {
      const vec weight = broadcast(weights[q * BLOCK + t]);
      for (int v = 0; v < VECS; ++v) parts[q][v] = fma(weight, row[v], parts[q][v]);
    }
  }
  for (isize q = 0; q < QUADS; ++q)
    for (int v = 0; v < VECS; ++v) store(sums + q * size + d + v * LANES, parts[q][v]);
}

void add_values(const float* const* values, isize count, const float* weights, isize size, float* sums) {
  isize d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES) add_values<4>(values, count, weights, d, size, sums);
  for (; d + LANES <= size; d += LANES) add_values<1>(values, count, weights, d, size, sums);
  for (; d < size; ++d)
    for (isize q = 0; q < QUADS; ++q)
      for (isize t = 0; t < count; ++t) sums[q * size + d] += weights[q * BLOCK + t] * values[t][d];
}

// Scores [4, BLOCK] to weights under the running maxima; what was summed before is rescaled to them.
void soften(float* scores, float* top, float* sum, float* sums, isize size) {
  for (isize q = 0; q < QUADS; ++q, scores += BLOCK, sums += size) {
    float high = top[q];
    for (isize t = 0; t < BLOCK; ++t) high = std::max(high, scores[t]);
    if (high > top[q]) {
      const float factor = exponential(top[q] - high);
      sum[q] *= factor;
      for (isize d = 0; d < size; ++d) sums[d] *= factor;
      top[q] = high;
    }
    float lanes[16] = {};
    for (isize at = 0; at < BLOCK; at += 16)
      for (isize i = 0; i < 16; ++i) {
        // A block may hide all its keys from a draft token.
        const float weight = scores[at + i] <= HIDDEN ? 0.0f : exponential(scores[at + i] - high);
        scores[at + i] = weight;
        lanes[i] += weight;
      }
    for (const float lane : lanes) sum[q] += lane;
  }
}

struct Scratch {
  float *queries, *keys, *values, *scores, *sums, *top, *sum;
};

// Room for `asked` queries, padded to whole quads, and a block of keys and values.
Scratch scratch_of(isize asked, isize size) {
  const isize padded = (asked + QUADS - 1) / QUADS * QUADS;
  const isize wanted = 2 * padded * size + 2 * BLOCK * size + QUADS * BLOCK + 2 * padded;
  if (static_cast<isize>(memory.size()) < wanted) memory.resize(static_cast<std::size_t>(wanted));
  float* at = memory.data();
  const auto cut = [&at](isize count) { return (at += count) - count; };
  return {cut(padded * size), cut(BLOCK * size), cut(BLOCK * size), cut(QUADS * BLOCK), cut(padded * size), cut(padded), cut(padded)};
}

bool sees(const Query& query, isize row, isize own) {
  if (query.mask == nullptr) return own <= row;
  return (query.mask[row * ((query.rows + 31) / 32) + own / 32] >> (own % 32)) & 1u;
}

// A run of a list of rows.
struct Run {
  const std::int32_t* rows;
  isize count;
};

void prefetch_rows(const Context& context, isize head, Run run) {
  for (isize t = 0; t < run.count; ++t) {
    prefetch_row(context, false, run.rows[t], head);
    prefetch_row(context, true, run.rows[t], head);
  }
}

// Four queries from `first` on with a block of keys; `own` is the number of its first own row, below 0 where it is context.
void attend_block(const Query& query, isize head, isize asked, isize first, const float* const* keys, const float* const* values,
                  isize count, isize own, Run next, const Scratch& scratch) {
  const isize size = query.context->size;
  const float* queries[QUADS];
  for (isize q = 0; q < QUADS; ++q) queries[q] = scratch.queries + (first + q) * size;
  for (isize t = 0; t < BLOCK; ++t) {
    float found[QUADS] = {HIDDEN, HIDDEN, HIDDEN, HIDDEN};
    if (t < next.count) prefetch_rows(*query.context, head, {next.rows + t, 1});
    if (t < count) dot_quad(queries, keys[t], size, found);
    for (isize q = 0; q < QUADS; ++q) {
      const bool hidden = own >= 0 && first + q < asked && !sees(query, (first + q) / query.group, own + t);
      scratch.scores[q * BLOCK + t] = hidden ? HIDDEN : found[q];
    }
  }
  float* sums = scratch.sums + first * size;
  soften(scratch.scores, scratch.top + first, scratch.sum + first, sums, size);
  add_values(values, count, scratch.scores, size, sums);
}

// All queries with a list of rows; own: these are the own rows, which not everyone sees.
void attend_list(const Query& query, isize head, const std::int32_t* rows, isize count, bool own, const Scratch& scratch) {
  const Context& context = *query.context;
  const isize asked = query.rows * query.group;
  const float *keys[BLOCK], *values[BLOCK];
  prefetch_rows(context, head, {rows, std::min(BLOCK, count)});
  for (isize at = 0; at < count; at += BLOCK) {
    const isize here = std::min(BLOCK, count - at);
    for (isize t = 0; t < here; ++t) {
      keys[t] = float_row(context, false, rows[at + t], head, scratch.keys + t * context.size);
      values[t] = float_row(context, true, rows[at + t], head, scratch.values + t * context.size);
    }
    for (isize first = 0; first < asked; first += QUADS) {
      const Run next{rows + at + BLOCK, first == 0 ? std::min(BLOCK, count - at - BLOCK) : 0};
      attend_block(query, head, asked, first, keys, values, here, own ? at : -1, next, scratch);
    }
  }
}

}  // namespace

void attend_part(const Query& query, isize head, const std::int32_t* rows, isize count, bool own, const Partial& partial) {
  const Context& context = *query.context;
  const isize size = context.size, asked = query.rows * query.group;
  const Scratch scratch = scratch_of(asked, size);
  const isize padded = (asked + QUADS - 1) / QUADS * QUADS;
  std::fill_n(scratch.sums, padded * size, 0.0f);
  std::fill_n(scratch.top, padded, HIDDEN);
  std::fill_n(scratch.sum, padded, 0.0f);
  for (isize q = 0; q < padded; ++q) {
    const isize row = q / query.group, at = row * context.heads * query.group + head * query.group + q % query.group;
    for (isize d = 0; d < size; ++d) scratch.queries[q * size + d] = q < asked ? query.queries[at * size + d] * query.scale : 0.0f;
  }
  attend_list(query, head, rows, count, false, scratch);
  if (own) attend_list(query, head, query.own, query.rows, true, scratch);
  std::copy_n(scratch.sums, asked * size, partial.sums);
  std::copy_n(scratch.top, asked, partial.top);
  std::copy_n(scratch.sum, asked, partial.total);
}

}  // namespace headrace
