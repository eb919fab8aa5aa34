// Products by storage, and their C interface.
#include "product.h"

#include <cstring>
#include <memory>

#include "storages.h"

// Declared here because Apple's compiler ships no omp.h.
extern "C" int omp_get_num_threads(void);
extern "C" int omp_get_thread_num(void);

namespace headrace {

namespace {

struct Functions {
  decltype(&float_share) share;
  decltype(&float_pack) pack;
  decltype(&float_unpack) unpack;
};

Functions functions_of(const Matrix& matrix) {
  switch (matrix.storage) {
    case INT8: return {int8_share, int8_pack, int8_unpack};
    case NF4: return {nf4_share, nf4_pack, nf4_unpack};
    default: return {float_share, float_pack, float_unpack};
  }
}

}  // namespace

void product_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize rank, isize size) {
  const isize count = panel_count(matrix.columns);
  functions_of(matrix).share(matrix, operand, rows, y, stride, count * rank / size, count * (rank + 1) / size);
}

namespace {

// Bytes at the start of a cache line, freed with the object.
struct Scratch {
  explicit Scratch(std::size_t count) : memory(new std::uint8_t[count + 63]) {}
  std::uint8_t* get() const { return memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64) % 64; }
  std::unique_ptr<std::uint8_t[]> memory;
};

}  // namespace

}  // namespace headrace

using namespace headrace;

extern "C" {

const char* headrace_isa(void) { return ISA; }

// Bytes of a matrix's panels.
std::int64_t headrace_panel_bytes(std::int64_t columns, std::int64_t depth, std::int64_t storage) {
  const isize padded = panel_count(columns) * PANEL;
  switch (storage) {
    case INT8: return padded * byte_stride(depth);
    case NF4: return nf4_bytes(columns, depth);
    case BFLOAT16: return padded * depth * 2;
    default: return padded * depth * 4;
  }
}

// Columns per panel: `columns` are padded to a multiple of it.
std::int64_t headrace_panel(void) { return PANEL; }

// 1 when every value is exactly a bf16, that is, when its low 16 bits are zero.
int headrace_is_bfloat16(const float* values, std::int64_t count, int threads) {
  std::uint32_t low = 0;
#pragma omp parallel for num_threads(threads) reduction(| : low) if (threads > 1)
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    low |= bits & 0xffffu;
  }
  return low == 0;
}

// weight: float[columns, depth], contiguous.
void headrace_pack(const Matrix* matrix, const float* weight, int threads) {
  functions_of(*matrix).pack(*matrix, weight, threads);
}

void headrace_unpack(const Matrix* matrix, float* weight, int threads) {
  functions_of(*matrix).unpack(*matrix, weight, threads);
}

std::int64_t headrace_byte_stride(std::int64_t depth) { return byte_stride(depth); }

// bytes: [rows, byte_stride(depth)]; scales: [rows].
void headrace_quantise(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t depth, std::uint8_t* bytes,
                       float* scales) {
  for (std::int64_t row = 0; row < rows; ++row)
    quantise_row(x + row * stride, depth, bytes + row * byte_stride(depth), scales + row);
}

// y[rows, columns] = x[rows, depth] @ W^T + bias. Rows of x are `stride` floats apart, those of y contiguous.
void headrace_matmul(const Matrix* matrix, const float* x, std::int64_t stride, std::int64_t rows, float* y, int threads) {
  const isize row_bytes = quantises(*matrix) ? byte_stride(matrix->depth) : 0;
  const Scratch bytes(rows * row_bytes), scales(row_bytes ? rows * sizeof(float) : 0);
  float* row_scales = reinterpret_cast<float*>(scales.get());
  const Operand operand{x, stride, bytes.get(), row_scales};
  // The team always has `threads` members: libgomp ends and restarts its threads when the size of a team changes.
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (row_bytes) {
#pragma omp for
      for (isize row = 0; row < rows; ++row)
        quantise_row(x + row * stride, matrix->depth, bytes.get() + row * row_bytes, row_scales + row);
    }
    product_share(*matrix, operand, rows, y, matrix->columns, omp_get_thread_num(), omp_get_num_threads());
  }
}

}  // extern "C"
