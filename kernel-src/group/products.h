// Sums of matrix products: library calls past the dispatcher.
#pragma once

#include <optional>
#include <vector>

#include "../common/kernels.h"
#include "../common/matrix_view.h"
#include "../common/side_stream.h"
#include "../common/tensors.h"

namespace lora_fused {

// out = alpha·a b, or out += that; out may be float32 where a and b are half precision: on a GPU one product
// (`supports_float_output`), which is fresh. Of a and b rows or columns are contiguous.
void multiply(const MatrixView& out, const MatrixView& a, const MatrixView& b, double alpha, bool add);
bool supports_float_output(const MatrixView& a);

// alpha·a b, one term of a sum: a [M, k], b [k, N].
struct Term {
  MatrixView a, b;
  double alpha = 1.0;
};

// out [M, N] = the sum of all terms + bias [N], of which the first has an alpha of 1: one launch of our own GEMM where
// that is supported and faster than the library's products one after another.
void multiply(const MatrixView& out, const std::vector<Term>& terms, const std::optional<Tensor>& bias,
              SideStream* side = nullptr);

// out [M, N] = D(the sum of the terms `dropped`) + the sum of `terms`, where one launch does it.
bool multiply_dropped(const MatrixView& out, const std::vector<Term>& dropped, const Dropped& mask,
                      const std::vector<Term>& terms, SideStream* side = nullptr);

// unscaled [M, N] = the sum of the terms `leading` and out = (scale - 1)∘unscaled + the sum of `terms` + bias, with
// mag_norm_scale [N] in float32, where one launch does both.
bool multiply_excess(const MatrixView& out, const MatrixView& unscaled, const std::vector<Term>& leading,
                     const std::vector<Term>& terms, const Tensor& mag_norm_scale, const std::optional<Tensor>& bias);

// unscaled [M, N] = the sum of all terms and out = scale∘unscaled, with mag_norm_scale [N] in float32, where one launch
// does both.
bool multiply_scaled(const MatrixView& out, const MatrixView& unscaled, const std::vector<Term>& terms,
                     const Tensor& mag_norm_scale);

// out [M, N] = the sum of the terms + bias [N], or, with mag_norm_scale [N] in float32, unscaled = that sum and out =
// scale∘unscaled. The a of the last `made` terms are outputs of `multiply_group`'s shrinks.
struct Sum {
  MatrixView out;
  std::vector<Term> terms;
  size_t made;
  std::optional<Tensor> bias;
  MaybeMatrixView unscaled = std::nullopt;
  MaybeTensor mag_norm_scale = std::nullopt;
};

// All shrinks and then all sums, where one launch does both; `zeros` of Adapters, GemmGroup::counters of them or none.
bool multiply_group(const std::vector<Shrink>& shrinks, const std::vector<Sum>& sums, const MaybeMatrixView& zeros,
                    SideStream* side = nullptr);
// How many of these it can use.
int64_t group_counters(int64_t rows);

}  // namespace lora_fused
