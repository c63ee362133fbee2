// Input checks that the CPU and the CUDA row_norm share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

namespace lora_fused {

inline std::string shape_of(const torch::stable::Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

inline void check_matrix(const char* name, const torch::stable::Tensor& t, bool cuda) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.dim() == 2, "row_norm: ", name, " must be 2-D, got shape ", shape_of(t));
  const auto dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "row_norm: ", name, " of shape ", shape_of(t), " must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(cuda ? t.is_cuda() : t.is_cpu(), "row_norm: ", name, " of shape ", shape_of(t), " must be on the ",
                  cuda ? "CUDA device" : "CPU", " like the other tensors");
}

// weight [N, K], lora_a [R, K], lora_b [N, R], all on one device.
inline void check_row_norm(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                           const torch::stable::Tensor& lora_b, bool cuda) {
  check_matrix("weight", weight, cuda);
  check_matrix("lora_a", lora_a, cuda);
  check_matrix("lora_b", lora_b, cuda);
  STD_TORCH_CHECK(lora_a.size(1) == weight.size(1), "row_norm: lora_a of shape ", shape_of(lora_a),
                  " does not match weight of shape ", shape_of(weight), ": expected [R, ", weight.size(1), "]");
  STD_TORCH_CHECK(lora_b.size(0) == weight.size(0) && lora_b.size(1) == lora_a.size(0), "row_norm: lora_b of shape ",
                  shape_of(lora_b), " does not match weight ", shape_of(weight), " and lora_a ", shape_of(lora_a),
                  ": expected [", weight.size(0), ", ", lora_a.size(0), "]");
  STD_TORCH_CHECK(!cuda || (lora_a.get_device_index() == weight.get_device_index() &&
                            lora_b.get_device_index() == weight.get_device_index()),
                  "row_norm: weight, lora_a and lora_b must be on one device");
}

}  // namespace lora_fused
