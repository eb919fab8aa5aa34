// The items of a sketch with the largest estimated attention.
//
// For each query head of the group: a table of products with the centroids, scores as sums of its entries, a softmax over all items. The
// heads' weights are added up, and a histogram over the leading bits of the sums (those of positive floats are in the order of
// their values) finds the bin in which the last item to take lies; only that bin is sorted.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "sketch.h"

namespace headrace {

namespace {

constexpr isize BINS = 1 << 12;
constexpr int SHIFT = 31 - 12;  // leaves the exponent and 4 bits of the fraction
constexpr isize STEP = 16;

typedef float quad __attribute__((vector_size(16)));

struct Room {
  std::vector<float> table, scores, weights, masses;
  std::vector<std::int32_t> bins, edge;
};

thread_local Room room;

template <typename T>
T* hold(std::vector<T>& part, isize size) {
  if (static_cast<isize>(part.size()) < size) part.resize(static_cast<std::size_t>(size));
  return part.data();
}

isize bin_of(float weight) {
  std::int32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits >> SHIFT;
}

// [queries, subspaces, width] scaled products.
const float* fill_table(const Query& query, isize head) {
  const Sketch& sketch = *query.sketch;
  const isize size = query.context->size, run = size / sketch.subspaces, width = sketch.width;
  const isize heads = query.context->heads, asked = query.rows * query.group;
  float* table = hold(room.table, asked * sketch.subspaces * width);
  const float* centroids = sketch.centroids + head * sketch.subspaces * run * width;
  for (isize q = 0; q < asked; ++q) {
    const isize row = q / query.group, at = row * heads * query.group + head * query.group + q % query.group;
    for (isize m = 0; m < sketch.subspaces; ++m) {
      float* to = table + (q * sketch.subspaces + m) * width;
      centroid_products(query.queries + at * size + m * run, centroids + m * run * width, run, width, to);
      for (isize c = 0; c < width; ++c) to[c] *= query.scale;
    }
  }
  return table;
}

// Scores of all joint cells: table [subspaces, width] to [1 << (subspaces * bits)].
void cell_scores(const Sketch& sketch, const float* table, float* scores) {
  const isize count = isize{1} << sketch.bits;
  std::copy_n(table, count, scores);
  isize size = count;
  for (isize m = 1; m < sketch.subspaces; ++m, size *= count)
    for (isize high = count - 1; high >= 0; --high) {  // downwards: the first block is read until the last round
      const float more = table[m * sketch.width + high];
      for (isize low = 0; low < size; ++low) scores[high * size + low] = scores[low] + more;
    }
}

// Adds the softmax over items to the cells' weights (one item's); returns the logarithm of its denominator. Sums go by lanes, so that they
// can be vectorised; cells beyond the last whole step, of which only tiny sketches have any, share the first lane.
float add_cells(float* scores, const std::int32_t* counts, isize cells, float* weights) {
  const isize whole = cells / STEP * STEP;
  float tops[STEP], sums[STEP] = {};
  std::fill_n(tops, STEP, -1e30f);
  for (isize at = 0; at < whole; at += STEP)
    for (isize i = 0; i < STEP; ++i) {
      const float score = counts[at + i] > 0 ? scores[at + i] : -1e30f;
      tops[i] = score > tops[i] ? score : tops[i];
    }
  for (isize c = whole; c < cells; ++c)
    if (counts[c] > 0) tops[0] = std::max(tops[0], scores[c]);
  const float most = *std::max_element(tops, tops + STEP);
  for (isize c = 0; c < cells; ++c) {
    const float e = exponential(scores[c] - most);
    scores[c] = counts[c] > 0 ? e : 0.0f;
  }
  for (isize at = 0; at < whole; at += STEP)
    for (isize i = 0; i < STEP; ++i) sums[i] += scores[at + i] * static_cast<float>(counts[at + i]);
  for (isize c = whole; c < cells; ++c) sums[0] += scores[c] * static_cast<float>(counts[c]);
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  const float share = 1.0f / total;
  for (isize c = 0; c < cells; ++c) weights[c] += scores[c] * share;
  return most + std::log(total);
}

// Scores of items [first, last) under four queries: table [subspaces, 4, width] turned to [subspaces, width, 4] by the caller.
void scan(const Sketch& sketch, isize head, const float* turned, isize first, isize last, float* scores, quad& most) {
  const std::uint8_t* codes = sketch.codes + head * sketch.subspaces * sketch.capacity;
  const isize width = sketch.width;
  for (isize item = first; item < last; ++item) {
    quad sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (isize m = 0; m < sketch.subspaces; ++m) {
      quad part;
      std::memcpy(&part, turned + (m * width + codes[m * sketch.capacity + item]) * QUADS, sizeof part);
      sum += part;
    }
    std::memcpy(scores + (item - first) * QUADS, &sum, sizeof sum);
    most = most > sum ? most : sum;
  }
}

// Adds the softmaxes of up to four queries to the items' weights; `logs` gets the logarithms of their denominators.
void add_items(const Query& query, isize head, isize length, const float* table, isize first_query, float* weights, float* logs) {
  const Sketch& sketch = *query.sketch;
  const isize width = sketch.width, runs = sketch.subspaces;
  const isize asked = std::min(QUADS, query.rows * query.group - first_query), count = length - sketch.skip;
  const isize padded = (count * QUADS + STEP - 1) / STEP * STEP;
  float* turned = hold(room.scores, runs * width * QUADS + padded);
  float* scores = turned + runs * width * QUADS;
  std::fill_n(turned, runs * width * QUADS, 0.0f);
  for (isize q = 0; q < asked; ++q)
    for (isize at = 0; at < runs * width; ++at) turned[at * QUADS + q] = table[(first_query + q) * runs * width + at];
  quad most = {-1e30f, -1e30f, -1e30f, -1e30f};
  scan(sketch, head, turned, sketch.skip, length, scores, most);
  for (isize i = count * QUADS; i < padded; ++i) scores[i] = -1e30f;
  float tops[STEP], sums[STEP] = {};
  for (isize i = 0; i < STEP; ++i) tops[i] = most[i % QUADS];
  for (isize at = 0; at < padded; at += STEP)
    for (isize i = 0; i < STEP; ++i) {
      const float e = exponential(scores[at + i] - tops[i]);
      scores[at + i] = e;
      sums[i] += e;
    }
  float shares[QUADS] = {};
  for (isize q = 0; q < asked; ++q) {
    const float total = sums[q] + sums[q + 4] + sums[q + 8] + sums[q + 12];
    shares[q] = 1.0f / total;
    logs[first_query + q] = most[q] + std::log(total);
  }
  for (isize i = 0; i < count; ++i) {
    const float* e = scores + i * QUADS;
    weights[sketch.skip + i] += (e[0] * shares[0] + e[1] * shares[1]) + (e[2] * shares[2] + e[3] * shares[3]);
  }
}

struct Bar {
  isize bin;   // where the last item to take lies
  isize take;  // items to take in all
};

// How many items to take, and down to which bin. counts null: one item a weight.
Bar find_bar(const Query& query, const float* weights, const std::int32_t* counts, isize size, isize items) {
  std::int32_t* bins = hold(room.bins, BINS);
  std::fill_n(bins, BINS, 0);
  for (isize i = 0; i < size; ++i) bins[bin_of(weights[i])] += counts == nullptr ? 1 : counts[i];
  isize most = std::min<isize>(query.most, items);
  if (query.keep > 0.0f) {
    float* masses = hold(room.masses, BINS);
    std::fill_n(masses, BINS, 0.0f);
    for (isize i = 0; i < size; ++i) masses[bin_of(weights[i])] += counts == nullptr ? weights[i] : weights[i] * counts[i];
    const float wanted = query.keep * static_cast<float>(query.rows * query.group);
    float mass = 0.0f;
    isize taken = 0, bin = BINS - 1;
    for (; bin > 0 && mass + masses[bin] < wanted; --bin) mass += masses[bin], taken += bins[bin];
    const float each = bins[bin] > 0 ? masses[bin] / static_cast<float>(bins[bin]) : 0.0f;
    if (each > 0.0f) taken += static_cast<isize>(std::ceil((wanted - mass) / each));
    most = std::min(most, std::max<isize>(taken, query.least));
  }
  isize above = 0, bin = BINS - 1;
  for (; bin > 0 && above + bins[bin] < most; --bin) above += bins[bin];
  return {bin, most};
}

// Items by the weights of their cells, the newest of a cell first.
isize take_cells(const Query& query, isize head, isize length, isize sorted, const float* weights, Bar bar, std::int32_t* out) {
  const Sketch& sketch = *query.sketch;
  const isize cells = isize{1} << (sketch.bits * sketch.subspaces);
  const std::uint16_t* cell_of = sketch.cells + head * sketch.capacity;
  const std::int32_t* order = sketch.order + head * sketch.capacity;
  const std::int32_t *starts = sketch.starts + head * cells, *ends = sketch.ends + head * cells, *counts = sketch.counts + head * cells;
  const isize tail = std::max(sorted, static_cast<isize>(sketch.skip));
  std::int32_t* edge = hold(room.edge, cells);
  isize found = 0, edges = 0;
  for (isize item = tail; item < length; ++item)
    if (bin_of(weights[cell_of[item]]) > bar.bin) out[found++] = static_cast<std::int32_t>(item);
  for (isize c = 0; c < cells; ++c) {
    if (counts[c] == 0) continue;
    const isize bin = bin_of(weights[c]);
    if (bin > bar.bin) found = std::copy(order + starts[c], order + ends[c], out + found) - out;
    else if (bin == bar.bin) edge[edges++] = static_cast<std::int32_t>(c);
  }
  std::sort(edge, edge + edges, [&](std::int32_t a, std::int32_t b) { return weights[a] > weights[b] || (weights[a] == weights[b] && a < b); });
  for (isize e = 0; e < edges && found < bar.take; ++e) {
    const isize c = edge[e];
    if (counts[c] > ends[c] - starts[c])
      for (isize item = length - 1; item >= tail && found < bar.take; --item)
        if (cell_of[item] == c) out[found++] = static_cast<std::int32_t>(item);
    for (isize at = ends[c] - 1; at >= starts[c] && found < bar.take; --at) out[found++] = order[at];
  }
  return found;
}

// Items by their own weights, the newest of equals first.
isize take_items(const float* weights, isize skip, isize length, Bar bar, std::int32_t* out) {
  std::int32_t* edge = hold(room.edge, length);
  isize found = 0, edges = 0;
  for (isize item = skip; item < length; ++item) {
    const isize bin = bin_of(weights[item]);
    if (bin > bar.bin) out[found++] = static_cast<std::int32_t>(item);
    else if (bin == bar.bin) edge[edges++] = static_cast<std::int32_t>(item);
  }
  const isize rest = std::min(edges, bar.take - found);
  const auto better = [&](std::int32_t a, std::int32_t b) { return weights[a] > weights[b] || (weights[a] == weights[b] && a > b); };
  if (rest < edges) std::nth_element(edge, edge + rest, edge + edges, better);
  return std::copy(edge, edge + rest, out + found) - out;
}

// Logarithms of the estimated weight of the items that were not chosen, one for each query.
void left_out(const Query& query, isize head, const float* table, const std::int32_t* chosen, isize found, float* logs) {
  const Sketch& sketch = *query.sketch;
  const isize asked = query.rows * query.group, width = sketch.width, mask = (isize{1} << sketch.bits) - 1;
  for (isize q = 0; q < asked; ++q) {
    const float* mine = table + q * sketch.subspaces * width;
    double share = 0.0;
    for (isize i = 0; i < found; ++i) {
      float score = 0.0f;
      for (isize m = 0; m < sketch.subspaces; ++m) {
        const isize code = sketch.cells == nullptr ? sketch.codes[(head * sketch.subspaces + m) * sketch.capacity + chosen[i]]
                                                   : (sketch.cells[head * sketch.capacity + chosen[i]] >> (sketch.bits * m)) & mask;
        score += mine[m * width + code];
      }
      share += exponential(score - logs[q]);
    }
    logs[q] += static_cast<float>(std::log(std::max(1.0 - share, 1e-30)));
  }
}

}  // namespace

isize search(const Query& query, isize head, isize length, isize sorted, std::int32_t* chosen) {
  const Sketch& sketch = *query.sketch;
  const isize asked = query.rows * query.group, items = std::max<isize>(0, length - sketch.skip);
  if (items == 0 || query.most == 0) return 0;
  const float* table = fill_table(query, head);
  float* logs = query.logs + head * asked;
  isize found;
  if (sketch.cells != nullptr) {
    const isize cells = isize{1} << (sketch.bits * sketch.subspaces);
    const std::int32_t* counts = sketch.counts + head * cells;
    float *scores = hold(room.scores, cells), *weights = hold(room.weights, cells);
    std::fill_n(weights, cells, 0.0f);
    for (isize q = 0; q < asked; ++q) {
      cell_scores(sketch, table + q * sketch.subspaces * sketch.width, scores);
      logs[q] = add_cells(scores, counts, cells, weights);
    }
    found = take_cells(query, head, length, sorted, weights, find_bar(query, weights, counts, cells, items), chosen);
  } else {
    float* weights = hold(room.weights, length);
    std::fill_n(weights, length, 0.0f);
    for (isize q = 0; q < asked; q += QUADS) add_items(query, head, length, table, q, weights, logs);
    found = take_items(weights, sketch.skip, length, find_bar(query, weights + sketch.skip, nullptr, items, items), chosen);
  }
  if (query.value_sum != nullptr) left_out(query, head, table, chosen, found, logs);
  return found;
}

}  // namespace headrace
