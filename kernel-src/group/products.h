// Sums of matrix products: library calls past the dispatcher.
#pragma once

#include <optional>
#include <vector>

#include "../common/kernels.h"
#include "../common/matrix_view.h"
#include "../common/tensors.h"

namespace lora_fused {

// out = alpha·a b, or out += that; out may be float32 where a and b are half precision: on a GPU one product
// (`gives_float`), which is fresh. Of a and b rows or columns are contiguous.
void multiply(const View& out, const View& a, const View& b, double alpha, bool add);
bool gives_float(const View& a);

// alpha·a b, one term of a sum: a [M, k], b [k, N].
struct Term {
  View a, b;
  double alpha = 1.0;
};

// out [M, N] = the sum of all terms + bias [N], of which the first has an alpha of 1: one launch of our own GEMM where it serves and is faster
// than the library's products one after another.
void multiply(const View& out, const std::vector<Term>& terms, const std::optional<Tensor>& bias);

// out [M, N] = D(the sum of the terms `dropped`) + the sum of `terms`, where one launch does it.
bool multiply_dropped(const View& out, const std::vector<Term>& dropped, const Dropped& mask, const std::vector<Term>& terms);

// z [M, N] = the sum of the terms `leading` and out = (gain - 1)∘z + the sum of `terms` + bias, gain [N] in float32,
// where one launch does both.
bool multiply_excess(const View& out, const View& z, const std::vector<Term>& leading, const std::vector<Term>& terms,
                     const Tensor& gain, const std::optional<Tensor>& bias);

// z [M, N] = the sum of all terms and out = gain∘z, gain [N] in float32, where one launch does both.
bool multiply_scaled(const View& out, const View& z, const std::vector<Term>& terms, const Tensor& gain);

}  // namespace lora_fused
