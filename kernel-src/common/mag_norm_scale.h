// DoRA's scale magnitude / norm, [N], PEFT's `mag_norm_scale`, for the CPU and the CUDA op.
//
// A scale that differs from 1 by no more than the norm's own rounding error is 1: at initialisation,
// where the magnitude is a norm that another order of summation gave, DoRA then changes nothing,
// down to the last bit, as PEFT's own does.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "host_device.h"

namespace lora_fused {

constexpr double kScaleUnits = 4.0;  // of the rounding unit: the native norm is within 3e-7

template <typename T>
LORA_FUSED_HD T mag_norm_scale_of(T magnitude, T norm, T unit) {
  const T scale = magnitude / norm, off = scale - T(1);
  return off <= unit && off >= -unit ? T(1) : scale;
}

inline void check_mag_norm_scale(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm, bool cuda) {
  using torch::headeronly::ScalarType;
  const auto dtype = norm.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "mag_norm_scale: norm must be float32 or float64");
  STD_TORCH_CHECK(magnitude.scalar_type() == dtype, "mag_norm_scale: magnitude must have norm's dtype");
  STD_TORCH_CHECK(magnitude.dim() == 1 && norm.dim() == 1 && magnitude.numel() == norm.numel() &&
                      magnitude.is_contiguous() && norm.is_contiguous(),
                  "mag_norm_scale: magnitude and norm must be contiguous vectors of one length");
  STD_TORCH_CHECK(cuda
                      ? magnitude.is_cuda() && norm.is_cuda() && magnitude.get_device_index() == norm.get_device_index()
                      : magnitude.is_cpu() && norm.is_cpu(),
                  "mag_norm_scale: magnitude and norm must be on one device");
}

}  // namespace lora_fused
