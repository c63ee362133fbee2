// Tensors past the dispatcher, see tensors.h.
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace lora_fused {

int64_t rows_in(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

Tensor in_rows(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

MatrixView matrix(const Tensor& y) {
  const Tensor whole = in_rows(y);
  const int64_t cols = y.size(y.dim() - 1);
  if (whole.dim() == 2 && whole.stride(0) == cols && whole.stride(1) == 1) return whole;  // else of one row or column
  return MatrixView(whole, rows_in(y), cols, cols, 1);
}

MatrixView unread_matrix(const Tensor& y) {
  const int64_t cols = y.size(y.dim() - 1);
  return MatrixView(y, rows_in(y), cols, cols, 1);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  code, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor fresh_like(const MatrixView& m) { return empty(m.base(), {m.size(0), m.size(1)}, m.scalar_type()); }

Tensor empty_as(const Tensor& of, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < of.dim(); ++d) sizes.push_back(of.size(d));
  sizes.push_back(cols);
  return empty(of, sizes, of.scalar_type());
}

bool copy_small(const MatrixView& to, const MatrixView& from) {
  constexpr int64_t kElements = 32768;  // up to so many the library copies on one thread as well
  const int64_t rows = to.size(0), cols = to.size(1);
  if (to.is_cuda() || rows * cols > kElements || to.scalar_type() != from.scalar_type() || to.stride(1) != 1 ||
      from.stride(1) != 1)
    return false;
  const auto size = static_cast<int64_t>(to.base().element_size());
  auto* out = static_cast<char*>(to.mutable_data_ptr());
  const auto* in = static_cast<const char*>(from.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(out + i * to.stride(0) * size, in + i * from.stride(0) * size, cols * size);
  return true;
}

}  // namespace lora_fused
