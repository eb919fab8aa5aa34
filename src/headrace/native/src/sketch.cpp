// A decode step's attention by sketch: code what has left the local window, search, attend. See sketch.h.
//
// Threads take tasks from counters: a K/V head of a sequence to search, then parts of a head's rows to attend to. A part has a
// fixed number of rows and parts are merged in order, so no bit of a result depends on the number of threads or on who did what.
#include <algorithm>
#include <atomic>
#include <vector>

#include "barrier.h"
#include "rows.h"
#include "sketch.h"

extern "C" int omp_get_num_threads(void);

namespace headrace {
namespace {

constexpr isize PART = 2048;  // rows of a task

struct Task {
  const Query* query;
  isize head;
  isize room;  // where its row of partial results begins, in parts
};

struct Piece {
  const Task* task;
  isize first, count, number;
  bool own;
};

isize chosen_room(const Query& query) { return query.initial + query.most + query.length - query.local; }

// Codes, sorts, searches and lists the rows to attend to.
void find_rows(const Task& task) {
  const Query& query = *task.query;
  const Sketch& sketch = *query.sketch;
  const Context& context = *query.context;
  const isize length = sketch.length + query.fresh, head = task.head;
  code_items(sketch, context, query.initial, head, sketch.length, length, query.resort == 0);
  if (query.resort != 0) sort_items(sketch, head, length);
  if (query.value_sum != nullptr) {
    std::vector<float> room(static_cast<std::size_t>(context.size));
    float* sum = query.value_sum + head * context.size;
    for (isize item = std::max<isize>(sketch.length, sketch.skip); item < length; ++item) {
      const float* value = float_row(context, true, row_of(context, query.initial + item), head, room.data());
      for (isize d = 0; d < context.size; ++d) sum[d] += value[d];
    }
  }
  std::int32_t* chosen = query.chosen + head * chosen_room(query);
  const isize found = search(query, head, length, query.resort != 0 ? length : sketch.sorted, chosen);
  for (isize i = 0; i < found; ++i) chosen[i] = row_of(context, query.initial + chosen[i]);
  isize count = found;
  for (isize token = sketch.skip; token < std::min<isize>(sketch.skip + query.initial, query.local); ++token)
    chosen[count++] = row_of(context, token);
  for (isize token = std::max<isize>(query.local, sketch.skip); token < query.length; ++token) chosen[count++] = row_of(context, token);
  query.found[head] = static_cast<std::int32_t>(count);
}

// Merges a head's parts, adds what was left out with the mean value, and writes the rows out.
void finish(const Task& task, isize parts, const float* partials) {
  const Query& query = *task.query;
  const isize size = query.context->size, asked = query.rows * query.group, stride = asked * (size + 2);
  for (isize q = 0; q < asked; ++q) {
    const isize row = q / query.group;
    float* out = query.out + (row * query.context->heads * query.group + task.head * query.group + q % query.group) * size;
    float high = -1e30f, weight = 0.0f;
    for (isize p = 0; p < parts; ++p) high = std::max(high, partials[p * stride + asked * size + q]);
    std::fill_n(out, size, 0.0f);
    for (isize p = 0; p < parts; ++p) {
      const float* part = partials + p * stride;
      const float factor = exponential(part[asked * size + q] - high);
      weight += factor * part[asked * (size + 1) + q];
      for (isize d = 0; d < size; ++d) out[d] += factor * part[q * size + d];
    }
    const isize items = query.sketch->length + query.fresh - query.sketch->skip;
    if (query.value_sum != nullptr && items > 0) {
      const float rest = exponential(query.logs[task.head * asked + q] - high);
      const float* mean = query.value_sum + task.head * size;
      weight += rest;
      for (isize d = 0; d < size; ++d) out[d] += rest / static_cast<float>(items) * mean[d];
    }
    for (isize d = 0; d < size; ++d) out[d] /= weight;
  }
}

std::vector<Piece> cut(const std::vector<Task>& tasks) {
  std::vector<Piece> pieces;
  for (const Task& task : tasks) {
    const isize count = task.query->found[task.head];
    const isize parts = std::max<isize>(1, (count + PART - 1) / PART);
    for (isize p = 0; p < parts; ++p)
      pieces.push_back({&task, p * PART, std::min(PART, count - p * PART), p, p + 1 == parts && task.query->own != nullptr});
  }
  return pieces;
}

// Calls each(i) for all i below `count`, on whichever thread comes first.
template <typename Each>
void share(std::atomic<isize>& next, isize count, Each&& each) {
  for (isize i; (i = next.fetch_add(1)) < count;) each(i);
}

void run(const Query* queries, isize count, int threads) {
  std::vector<Task> tasks;
  isize room = 0;
  for (isize i = 0; i < count; ++i)
    for (isize head = 0; head < queries[i].context->heads; ++head) {
      tasks.push_back({queries + i, head, room});
      room += (chosen_room(queries[i]) / PART + 1) * queries[i].rows * queries[i].group * (queries[i].context->size + 2);
    }
  thread_local std::vector<float> memory;
  if (static_cast<isize>(memory.size()) < room) memory.resize(static_cast<std::size_t>(room));
  float* partials = memory.data();
  std::vector<Piece> pieces;
  std::atomic<isize> searched{0}, attended{0}, merged{0};
  Barrier meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const isize team = omp_get_num_threads();
    const isize all = static_cast<isize>(tasks.size());
    share(searched, all, [&](isize i) { find_rows(tasks[i]); });
    meeting.wait(team);
#pragma omp master
    pieces = cut(tasks);
    meeting.wait(team);
    share(attended, static_cast<isize>(pieces.size()), [&](isize i) {
      const Piece& piece = pieces[i];
      const Query& query = *piece.task->query;
      const isize asked = query.rows * query.group, size = query.context->size;
      float* at = partials + piece.task->room + piece.number * asked * (size + 2);
      const std::int32_t* rows = query.chosen + piece.task->head * chosen_room(query) + piece.first;
      attend_part(query, piece.task->head, rows, piece.count, piece.own, {at, at + asked * size, at + asked * (size + 1)});
    });
    meeting.wait(team);
    share(merged, all, [&](isize i) {
      const isize parts = std::max<isize>(1, (tasks[i].query->found[tasks[i].head] + PART - 1) / PART);
      finish(tasks[i], parts, partials + tasks[i].room);
    });
  }
}

}  // namespace
}  // namespace headrace

using namespace headrace;

extern "C" {

// The size of the structs, for their owner to check its own against: Context, Sketch, Query.
void headrace_sketch_sizes(std::int64_t* sizes) {
  for (const std::size_t found : {sizeof(Context), sizeof(Sketch), sizeof(Query)}) *sizes++ = static_cast<std::int64_t>(found);
}

// Codes the items [first, last) of all heads; with `sort`, sorts all items below `last` then.
void headrace_sketch_code(const Sketch* sketch, const Context* context, std::int64_t initial, std::int64_t first, std::int64_t last,
                          int sort, int threads) {
  constexpr isize STRIDE = 512;
  const isize blocks = (last - first + STRIDE - 1) / STRIDE, heads = context->heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize i = 0; i < blocks * heads; ++i) {
    const isize from = first + i / heads * STRIDE;
    code_items(*sketch, *context, initial, i % heads, from, std::min<isize>(last, from + STRIDE), false);
  }
  if (sort == 0) return;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize head = 0; head < heads; ++head) sort_items(*sketch, head, last);
}

// Sorts the items that are there.
void headrace_sketch_sort(const Sketch* sketch, std::int64_t heads, std::int64_t length, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize head = 0; head < heads; ++head) sort_items(*sketch, head, length);
}

// The search alone: into `chosen` and `found` of the query, items and not rows.
void headrace_sketch_search(const Query* query, int threads) {
  const isize heads = query->context->heads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (isize head = 0; head < heads; ++head)
    query->found[head] = static_cast<std::int32_t>(
        search(*query, head, query->sketch->length, query->sketch->sorted, query->chosen + head * chosen_room(*query)));
}

// One layer's attention of several sequences.
void headrace_sketch_attend(const Query* queries, std::int64_t count, int threads) { run(queries, count, threads); }

}  // extern "C"
