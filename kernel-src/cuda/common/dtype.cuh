// Values of a dtype that is known when the kernel runs, and the types that kernels know torch's by.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

#include "../../common/dtypes.h"

namespace lora_fused {

// CUDA's own type for torch's: __nv_bfloat16 and __half have the intrinsics.
template <typename T>
using CudaType = std::conditional_t<std::is_same_v<T, torch::headeronly::BFloat16>, __nv_bfloat16,
                                    std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, __half, T>>;

enum Dtype : int { kFloat, kBFloat16, kHalf };

// An error that begins with `name` for another dtype.
inline int dtype_code(torch::headeronly::ScalarType dtype, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? kFloat : dtype == ScalarType::BFloat16 ? kBFloat16 : kHalf;
}

__device__ __forceinline__ float load_as_float(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat) return static_cast<const float*>(data)[i];
  if (dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

__device__ __forceinline__ void store_float(void* data, int dtype, int64_t i, float value) {
  if (dtype == kFloat)
    static_cast<float*>(data)[i] = value;
  else if (dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(data)[i] = __float2half(value);
}

}  // namespace lora_fused
