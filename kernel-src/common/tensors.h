// Tensors and matrices as the ops make and read them, past the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "matrix_view.h"

#if defined(CUDA_KERNEL)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lora_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

inline void append(Tensors& to, const Tensors& more) { to.insert(to.end(), more.begin(), more.end()); }

// Tokens of [..., K].
int64_t rows_in(const Tensor& x);

// A copy only of what is not: the dispatcher's own answer takes microseconds of host time.
Tensor in_rows(const Tensor& t);

// [..., N] as [M, N]; a copy only of what is not contiguous.
MatrixView matrix(const Tensor& y);

// The same of one whose values nobody reads: any strides will do.
MatrixView unread_matrix(const Tensor& y);

// Straight from the allocator, past the dispatcher; on like's device.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

// Contiguous, of m's shape and dtype.
Tensor fresh_like(const MatrixView& m);

// [*of's leading dimensions, cols], and it as a matrix.
Tensor empty_as(const Tensor& of, int64_t cols);

// to = from on the CPU, small matrices of one dtype and shape whose rows have no gaps: false where they are not. The
// library's copy is an iterator, which takes 1 µs, and 3 where caches are cold.
bool copy_small(const MatrixView& to, const MatrixView& from);

#if defined(CUDA_KERNEL)
// x's device for the rest of a scope.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    namespace accelerator = torch::stable::accelerator;
    if (x.is_cuda() && x.get_device_index() != accelerator::getCurrentDeviceIndex())
      guard_.emplace(x.get_device_index());
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
