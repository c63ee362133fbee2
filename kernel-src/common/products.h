// Matrices of a stable-ABI tensor and sums of products of them, chained library calls past the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#if defined(CUDA_KERNEL)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lora_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

inline Tensor view(const Tensor& base, int64_t rows, int64_t cols, int64_t row_stride,
                   int64_t col_stride, int64_t offset) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(base.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& m) {
  return view(m, m.size(1), m.size(0), m.stride(1), m.stride(0), 0);
}

inline Tensor rows_of(const Tensor& m, int64_t first, int64_t count) {
  return view(m, count, m.size(1), m.stride(0), m.stride(1), first * m.stride(0));
}

inline Tensor columns_of(const Tensor& m, int64_t first, int64_t count) {
  return view(m, m.size(0), count, m.stride(0), m.stride(1), first * m.stride(1));
}

// Tokens of [..., K].
inline int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// [..., N] as [M, N]; a copy only of what is not contiguous.
inline Tensor matrix(const Tensor& y) {
  const Tensor whole = y.is_contiguous() ? y : torch::stable::contiguous(y);
  const int64_t cols = y.size(y.dim() - 1);
  return view(whole, rows_in(y), cols, cols, 1, 0);
}

// Straight from the allocator, past the dispatcher.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                  sizes.data(), strides.data(), code,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// Contiguous, of m's shape and dtype.
inline Tensor fresh_like(const Tensor& m) {
  return empty(m, {m.size(0), m.size(1)}, m.scalar_type());
}

// [*of's leading dimensions, cols].
inline Tensor empty_as(const Tensor& of, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < of.dim(); ++d) sizes.push_back(of.size(d));
  sizes.push_back(cols);
  return empty(of, sizes, of.scalar_type());
}

// out = beta·add + alpha·a b; add may be out itself, and is not read at beta = 0.
inline void addmm(const Tensor& out, const Tensor& add, const Tensor& a, const Tensor& b,
                  double beta, double alpha) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), add.get(), a.get(), b.get(), beta, alpha));
}

inline void mm(const Tensor& out, const Tensor& a, const Tensor& b) {
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    return;
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = a b in float32 for half-precision a and b, where the library has that product.
inline bool mm_to_float(const Tensor& out, const Tensor& a, const Tensor& b) {
#if defined(CUDA_KERNEL)
  const auto dtype = a.scalar_type();
  if (out.is_cuda() && out.scalar_type() == ScalarType::Float &&
      (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half)) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_mm_dtype_out(out.get(), a.get(), b.get(), aoti_torch_dtype_float32()));
    return true;
  }
#endif
  return false;
}

// a b, one term of a sum: a [M, k] with contiguous rows, b [k, N] of any strides.
struct Term {
  Tensor a, b;
};

// out [M, N] = the sum of all terms + bias [N]; with `add` the sum is added to out, and no bias.
inline void multiply(const Tensor& out, const std::vector<Term>& terms, const Optionals::value_type& bias,
                     bool add) {
  bool fresh = !add;
  for (const Term& term : terms) {
    if (fresh && bias)
      addmm(out, *bias, term.a, term.b, 1.0, 1.0);
    else if (fresh)
      mm(out, term.a, term.b);
    else
      addmm(out, out, term.a, term.b, 1.0, 1.0);
    fresh = false;
  }
}

#if defined(CUDA_KERNEL)
// x's device for the rest of a scope.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    if (x.is_cuda()) guard_.emplace(x.get_device_index());
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
