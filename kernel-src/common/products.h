// Sums of matrix products: library calls past the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "lora_group.h"
#include "view.h"

#if defined(CUDA_KERNEL)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lora_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

// Tokens of [..., K].
int64_t rows_in(const Tensor& x);

// A copy only of what is not: the dispatcher's own answer takes microseconds of host time.
Tensor in_rows(const Tensor& t);

// [..., N] as [M, N]; a copy only of what is not contiguous.
View matrix(const Tensor& y);

// Straight from the allocator, past the dispatcher; on like's device.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

// Contiguous, of m's shape and dtype.
Tensor fresh_like(const View& m);

// [*of's leading dimensions, cols], and it as a matrix.
Tensor empty_as(const Tensor& of, int64_t cols);

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

#if defined(CUDA_KERNEL)
// out = alpha·a b + beta·out by cuBLAS itself, on the current stream of torch's handle. False where it
// can't be: another dtype than half precision, sizes beyond 32 bits, cuBLAS not found in the process.
bool blas_gemm(const View& out, const View& a, const View& b, float alpha, float beta);

// x's device for the rest of a scope.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    namespace accelerator = torch::stable::accelerator;
    if (x.is_cuda() && x.get_device_index() != accelerator::getCurrentDeviceIndex()) guard_.emplace(x.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};
#else
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
#endif

}  // namespace lora_fused
