// DoRA's scale magnitude / norm on CUDA, see common/mag_norm_scale.h. One thread an element: a launch is all it costs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../common/mag_norm_scale.h"

namespace lora_fused::mag_norm_scale {

constexpr int kThreads = 256;

template <typename T>
__global__ void mag_norm_scale_fwd_kernel(T* __restrict__ scale, const T* __restrict__ magnitude,
                                          const T* __restrict__ norm, int64_t count, T unit) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) scale[i] = mag_norm_scale_of<T>(magnitude[i], norm[i], unit);
}

}  // namespace lora_fused::mag_norm_scale
