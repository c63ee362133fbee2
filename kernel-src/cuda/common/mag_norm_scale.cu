// The launch of mag_norm_scale.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../../common/dtypes.h"
#include "../../common/kernels.h"
#include "mag_norm_scale.cuh"
#include "stream.h"

namespace {

using namespace lora_fused::mag_norm_scale;

template <typename T>
void run(const torch::stable::Tensor& out, const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm,
         cudaStream_t stream) {
  const T unit = T(lora_fused::kScaleUnits) * std::numeric_limits<T>::epsilon();
  const int64_t count = norm.numel();
  const unsigned grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  mag_norm_scale_fwd_kernel<T><<<grid, kThreads, 0, stream>>>(
      static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(magnitude.const_data_ptr()),
      static_cast<const T*>(norm.const_data_ptr()), count, unit);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

torch::stable::Tensor lora_fused::mag_norm_scale_cuda(const torch::stable::Tensor& magnitude,
                                                      const torch::stable::Tensor& norm) {
  lora_fused::check_mag_norm_scale(magnitude, norm, /*cuda=*/true);
  const torch::stable::Tensor out = torch::stable::empty_like(norm);
  if (norm.numel() == 0) return out;
  const cudaStream_t stream = lora_fused::stream_of(norm);
  LORA_FUSED_WIDE(norm.scalar_type(), "mag_norm_scale", [&] { run<scalar_t>(out, magnitude, norm, stream); });
  return out;
}
