// One iteration of clustering: which centroid every key is nearest to, and the sums of the keys of each.
#include <algorithm>
#include <vector>

#include "sketch.h"

namespace headrace {
namespace {

constexpr isize WIDTH = 16;  // centroids are padded to a multiple of it

// Described by their owner: Iteration in sketch.py.
struct Iteration {
  const float* runs;  // key t's part in sub-space m of row r: at r * row_stride + m * run_stride + t * key_stride
  std::int64_t row_stride, run_stride, key_stride;
  const float* weights;    // [rows, keys]: 0 for padding
  const float* centroids;  // [rows, subspaces, count, run]
  std::int64_t rows, subspaces, keys, count, run;
  std::int64_t* codes;  // [rows, subspaces, keys]
  float* best;          // alike: the largest x z - |z|^2 / 2
  float* sums;          // as centroids: weighted, to be added to
  float* counts;        // [rows, subspaces, count], likewise
};

// One sub-space of one row, by one thread from the first key to the last, so that sums do not depend on the number of threads.
void assign(const Iteration& it, isize row, isize m) {
  const isize width = (it.count + WIDTH - 1) / WIDTH * WIDTH, at = row * it.subspaces + m;
  const float* centroids = it.centroids + at * it.count * it.run;
  std::vector<float> room(static_cast<std::size_t>((it.run + 2) * width), 0.0f);
  float *turned = room.data(), *half = turned + it.run * width, *products = half + width;
  std::fill_n(half, width, 3e38f);
  for (isize c = 0; c < it.count; ++c) {
    float square = 0.0f;
    for (isize d = 0; d < it.run; ++d) {
      const float z = centroids[c * it.run + d];
      turned[d * width + c] = z;
      square += z * z;
    }
    half[c] = square / 2;
  }
  const float* from = it.runs + row * it.row_stride + m * it.run_stride;
  float *sums = it.sums + at * it.count * it.run, *counts = it.counts + at * it.count;
  for (isize t = 0; t < it.keys; ++t, from += it.key_stride) {
    centroid_products(from, turned, it.run, width, products);
    const isize code = nearest(products, half, width);
    it.codes[at * it.keys + t] = code;
    it.best[at * it.keys + t] = products[code] - half[code];
    const float weight = it.weights[row * it.keys + t];
    counts[code] += weight;
    for (isize d = 0; d < it.run; ++d) sums[code * it.run + d] += weight * from[d];
  }
}

}  // namespace
}  // namespace headrace

using namespace headrace;

extern "C" {

std::int64_t headrace_sketch_iteration_size() { return sizeof(Iteration); }

void headrace_sketch_iterate(const Iteration* iteration, int threads) {
  const isize runs = iteration->subspaces, tasks = iteration->rows * runs;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize i = 0; i < tasks; ++i) assign(*iteration, i / runs, i % runs);
}

}  // extern "C"
