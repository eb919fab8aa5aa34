// Layers of a decoder over a packed batch of rows, and the head, in one parallel region: a step is one call.
//
// A layer with heads of `size` dimensions, rows x, and everything in brackets where the layer has it:
//
//   x += residual * [norm](out(attention(rotate([norm](q)), rotate([norm](k)), v)))   with q, k, v = qkv([norm](x))
//   x += residual * [norm](down(activation(gate) * up))                               with gate, up = gate_up([norm](x))
//
// Half a layer ends behind attention, so that a caller can stop there, attend to some rows itself, and go on. Attention is the
// worker of models/attention, a C function that every thread calls with the layer's argument block.
//
// Between barriers threads share the columns of a product, or the rows of everything else; every row is computed by itself in
// one fixed order, so its bits depend neither on the other rows nor on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "barrier.h"
#include "product.h"
#include "rows.h"

// Declared here because Apple's compiler ships no omp.h.
extern "C" int omp_get_num_threads(void);
extern "C" int omp_get_thread_num(void);

namespace headrace {

// The structs below are described by their owner: those of the same names in step.py.

// An RMS norm over runs of `width` floats; none where `scale` is null.
struct Norm {
  const float* scale;  // [width]
  std::int64_t width;
  float epsilon;
};

// Where a layer's K and V live: [slots, heads, size] float32 each; where there are scales [slots, heads], int8 codes.
struct Planes {
  void *keys, *values;
  float *key_scales, *value_scales;
};

struct Layer {
  const Matrix *qkv, *out, *gate_up, *down;
  Norm before_attention, queries, keys, after_attention, before_mlp, after_mlp;
  const float *cosines, *sines;  // [positions, turned]; null where nothing is rotated
  std::int64_t turned;           // dimensions of a head that are rotated
  std::int64_t interleaved;      // how they are paired, see rotate_head()
  std::int64_t query_heads, heads, size;
  Planes planes;
  void (*attend)(void*);
  void* block;  // its argument; it reads `queries` and writes `attended` of Step
  float residual;
  std::int32_t activation;
  std::int64_t gated;
};

struct Head {
  Norm norm;
  const Matrix* matrix;
  float scale;    // of the logits,
  float softcap;  // which become softcap * tanh(logits / softcap); 0 for none
};

struct Embedding {
  const float* table;  // [vocabulary, hidden]
  float scale;
};

struct Step {
  const Layer* layers;
  const Embedding* embedding;  // null: `x` holds the rows already
  const Head* head;            // null: leave the rows in `x`
  std::int64_t begin, end;     // half layers to run, in order; the embedding goes before, the head behind
  std::int64_t rows, hidden;
  const std::int32_t *ids, *positions, *slots;  // [rows] each
  const std::int32_t* wanted;                   // [logit_rows] rows for the head
  std::int64_t logit_rows;
  float* x;         // [rows, hidden], the residual stream
  float* input;     // [rows, widest operand of a product but attention's]
  float* output;    // [rows, widest result of a product]
  float* queries;   // [rows, query_heads * size]
  float* attended;  // [rows, query_heads * size]
  std::uint8_t* bytes;  // [rows, byte_stride(widest operand)]
  float* scales;        // [rows]
  float* logits;        // [logit_rows, columns of the head]
};

namespace {

// Codes from -127 to 127 of `size` floats, rounded half to even from x * (127 / largest); returns largest / 127.
float encode(const float* x, isize size, std::int8_t* codes) {
  float largest = 0.0f;
  for (isize i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float factor = 127.0f / std::max(largest, 1e-30f);
  for (isize i = 0; i < size; ++i) codes[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * factor));
  return largest / 127.0f;
}

// One head's K or V into its slot.
void write_slot(void* plane, float* scales, isize at, const float* x, isize size) {
  if (scales == nullptr)
    std::copy_n(x, size, static_cast<float*>(plane) + at * size);
  else
    scales[at] = encode(x, size, static_cast<std::int8_t*>(plane) + at * size);
}

// What one thread of the team does.
struct Member {
  const Step& step;
  Barrier& meeting;
  const isize rank, size;

  void barrier() const { meeting.wait(size); }

  template <typename Each>
  void share(isize count, Each&& each) const {
    for (isize row = count * rank / size, last = count * (rank + 1) / size; row < last; ++row) each(row);
  }

  // Makes row `row` of `x` ready for a product with `matrix`.
  void ready(const Matrix& matrix, const float* x, isize row) const {
    if (quantises(matrix)) quantise_row(x, matrix.depth, step.bytes + row * byte_stride(matrix.depth), step.scales + row);
  }

  // y = x @ matrix^T + bias, between barriers.
  void product(const Matrix& matrix, const float* x, isize rows, float* y) const {
    barrier();
    product_share(matrix, Operand{x, matrix.depth, step.bytes, step.scales}, rows, y, matrix.columns, rank, size);
    barrier();
  }

  // The input of a product with `matrix` from a row of the residual stream, normed where `norm` is one.
  void enter(const Norm& norm, const Matrix& matrix, const float* x, isize row) const {
    float* to = step.input + row * step.hidden;
    if (norm.scale != nullptr)
      norm_row(x, step.hidden, norm.scale, norm.epsilon, to);
    else
      std::copy_n(x, step.hidden, to);
    ready(matrix, to, row);
  }

  // Adds a row of a product to the residual stream, normed where `norm` is one.
  void leave(const Norm& norm, float residual, isize row) const {
    float *from = step.output + row * step.hidden, *x = step.x + row * step.hidden;
    if (norm.scale != nullptr) norm_row(from, step.hidden, norm.scale, norm.epsilon, from);
    if (residual == 1.0f)
      for (isize i = 0; i < step.hidden; ++i) x[i] += from[i];
    else
      for (isize i = 0; i < step.hidden; ++i) x[i] += from[i] * residual;
  }

  void embed() const {
    const Embedding& embedding = *step.embedding;
    share(step.rows, [&](isize row) {
      const float* from = embedding.table + step.ids[row] * step.hidden;
      float* x = step.x + row * step.hidden;
      for (isize i = 0; i < step.hidden; ++i) x[i] = from[i] * embedding.scale;
    });
  }

  void norm_heads(const Norm& norm, float* x, isize width) const {
    if (norm.scale == nullptr) return;
    for (isize at = 0; at < width; at += norm.width) norm_row(x + at, norm.width, norm.scale, norm.epsilon, x + at);
  }

  // Norms and rotates a row's queries and keys, and puts its keys and values into their slot.
  void place(const Layer& layer, isize row) const {
    const isize asked = layer.query_heads * layer.size, kept = layer.heads * layer.size, dim = layer.size;
    float *packed = step.output + row * (asked + 2 * kept), *keys = packed + asked, *values = keys + kept;
    norm_heads(layer.queries, packed, asked);
    norm_heads(layer.keys, keys, kept);
    if (layer.cosines != nullptr) {
      const isize at = step.positions[row] * layer.turned;
      for (float* head = packed; head < values; head += dim)
        rotate_head(head, layer.turned, layer.interleaved, layer.cosines + at, layer.sines + at);
    }
    std::copy_n(packed, asked, step.queries + row * asked);
    const Planes& planes = layer.planes;
    for (isize head = 0; head < layer.heads; ++head) {
      const isize at = step.slots[row] * layer.heads + head;
      write_slot(planes.keys, planes.key_scales, at, keys + head * dim, dim);
      write_slot(planes.values, planes.value_scales, at, values + head * dim, dim);
    }
  }

  void attention(const Layer& layer) const {
    product(*layer.qkv, step.input, step.rows, step.output);
    share(step.rows, [&](isize row) { place(layer, row); });
    barrier();
    layer.attend(layer.block);
    barrier();
  }

  void mlp(const Layer& layer, const Layer* next) const {
    const isize asked = layer.query_heads * layer.size, inner = layer.down->depth, wide = layer.gate_up->columns;
    if (quantises(*layer.out)) share(step.rows, [&](isize row) { ready(*layer.out, step.attended + row * asked, row); });
    product(*layer.out, step.attended, step.rows, step.output);
    share(step.rows, [&](isize row) {
      leave(layer.after_attention, layer.residual, row);
      enter(layer.before_mlp, *layer.gate_up, step.x + row * step.hidden, row);
    });
    product(*layer.gate_up, step.input, step.rows, step.output);
    share(step.rows, [&](isize row) {
      float* to = step.input + row * inner;
      gate_row(layer.activation, step.output + row * wide, inner, layer.gated, to);
      ready(*layer.down, to, row);
    });
    product(*layer.down, step.input, step.rows, step.output);
    share(step.rows, [&](isize row) {
      leave(layer.after_mlp, layer.residual, row);
      if (next != nullptr) enter(next->before_attention, *next->qkv, step.x + row * step.hidden, row);
    });
  }

  void head() const {
    const Head& head = *step.head;
    const isize columns = head.matrix->columns;
    barrier();
    share(step.logit_rows, [&](isize row) { enter(head.norm, *head.matrix, step.x + step.wanted[row] * step.hidden, row); });
    product(*head.matrix, step.input, step.logit_rows, step.logits);
    if (head.scale == 1.0f && head.softcap == 0.0f) return;
    const isize count = step.logit_rows * columns, first = count * rank / size, last = count * (rank + 1) / size;
    if (head.softcap == 0.0f)
      for (isize i = first; i < last; ++i) step.logits[i] *= head.scale;
    else
      for (isize i = first; i < last; ++i)
        step.logits[i] = hyperbolic_tangent(step.logits[i] * head.scale / head.softcap) * head.softcap;
  }

  void run() const {
    if (step.embedding != nullptr) {
      embed();
      barrier();
    }
    if (step.begin < step.end && step.begin % 2 == 0) {
      const Layer& first = step.layers[step.begin / 2];
      share(step.rows, [&](isize row) { enter(first.before_attention, *first.qkv, step.x + row * step.hidden, row); });
    }
    for (isize half = step.begin; half < step.end; ++half) {
      const Layer& layer = step.layers[half / 2];
      if (half % 2 == 0)
        attention(layer);
      else
        mlp(layer, half + 1 < step.end ? &layer + 1 : nullptr);
    }
    if (step.head != nullptr) head();
  }
};

}  // namespace

}  // namespace headrace

using namespace headrace;

extern "C" {

// The size of the structs, for their owner to check its own against: Step, Layer, Head, Embedding, Planes, Norm.
void headrace_step_sizes(std::int64_t* sizes) {
  for (const std::size_t found : {sizeof(Step), sizeof(Layer), sizeof(Head), sizeof(Embedding), sizeof(Planes), sizeof(Norm)})
    *sizes++ = static_cast<std::int64_t>(found);
}

void headrace_step(const Step* step, int threads) {
  Barrier meeting;
// The team always has `threads` members: libgomp ends and restarts its threads when the size of a team changes.
#pragma omp parallel num_threads(threads) if (threads > 1)
  Member{*step, meeting, omp_get_thread_num(), omp_get_num_threads()}.run();
}

}  // extern "C"
