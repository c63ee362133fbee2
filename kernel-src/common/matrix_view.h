// A matrix inside a stable-ABI tensor: what a product or a pass needs to know of it, without the tensor
// handle that the library would make for every slice and transpose.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace lora_fused {

class MatrixView {
 public:
  // All of a tensor of one or two dimensions.
  MatrixView(const torch::stable::Tensor& whole)  // NOLINT: a tensor is a view of itself
      : MatrixView(whole, whole.size(0), whole.dim() > 1 ? whole.size(1) : 1, whole.stride(0),
                   whole.dim() > 1 ? whole.stride(1) : 1) {
    is_base_ = whole.dim() == 2;
  }
  // From element `offset` of it on.
  MatrixView(const torch::stable::Tensor& base, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
             int64_t offset = 0)
      : base_(base),
        dtype_(base.scalar_type()),
        data_(static_cast<char*>(base.mutable_data_ptr())),
        sizes_{rows, cols},
        strides_{row_stride, col_stride},
        offset_(offset) {}

  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  int64_t numel() const { return sizes_[0] * sizes_[1]; }
  torch::headeronly::ScalarType scalar_type() const { return dtype_; }
  void* mutable_data_ptr() const { return data_ + offset_ * static_cast<int64_t>(base_.element_size()); }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  bool is_cuda() const { return base_.is_cuda(); }
  auto get_device_index() const { return base_.get_device_index(); }
  const torch::stable::Tensor& base() const { return base_; }

  MatrixView transposed() const { return part(sizes_[1], sizes_[0], strides_[1], strides_[0], 0); }
  // All of it is itself: what was a whole tensor needs no new handle.
  MatrixView rows(int64_t first, int64_t count) const {
    if (count == sizes_[0]) return *this;
    return part(count, sizes_[1], strides_[0], strides_[1], first * strides_[0]);
  }
  MatrixView columns(int64_t first, int64_t count) const {
    if (count == sizes_[1]) return *this;
    return part(sizes_[0], count, strides_[0], strides_[1], first * strides_[1]);
  }

  // As a tensor of two dimensions, for the library: a handle costs as much as half of a small product.
  torch::stable::Tensor tensor() const {
    if (is_base_) return base_;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(base_.get(), 2, sizes_, strides_, offset_, &handle));
    return torch::stable::Tensor(handle);
  }

 private:
  MatrixView part(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t offset) const {
    MatrixView view = *this;
    view.sizes_[0] = rows, view.sizes_[1] = cols;
    view.strides_[0] = row_stride, view.strides_[1] = col_stride;
    view.offset_ += offset;
    view.is_base_ = false;
    return view;
  }

  torch::stable::Tensor base_;
  torch::headeronly::ScalarType dtype_;
  char* data_;
  int64_t sizes_[2], strides_[2], offset_;
  bool is_base_ = false;  // all of a matrix
};

using MaybeMatrixView = std::optional<MatrixView>;

}  // namespace lora_fused
