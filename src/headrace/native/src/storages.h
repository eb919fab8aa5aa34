// What each family of storages provides to product.cpp: its share of a product, packing and unpacking.
//
// *_share computes panels [from, to) of y. *_pack fills panels, scales and compensation from weight [columns, depth], contiguous;
// *_unpack gives back the weights the products compute with.
#pragma once

#include "product.h"

namespace headrace {

void float_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to);
void float_pack(const Matrix& matrix, const float* weight, int threads);
void float_unpack(const Matrix& matrix, float* weight, int threads);

void int8_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to);
void int8_pack(const Matrix& matrix, const float* weight, int threads);
void int8_unpack(const Matrix& matrix, float* weight, int threads);

void nf4_share(const Matrix& matrix, const Operand& operand, isize rows, float* y, isize stride, isize from, isize to);
void nf4_pack(const Matrix& matrix, const float* weight, int threads);
void nf4_unpack(const Matrix& matrix, float* weight, int threads);
isize nf4_bytes(isize columns, isize depth);  // of the panels

}  // namespace headrace
