// The launch of mag_norm_scale.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../../../torch-ext/torch_binding.h"
#include "mag_norm_scale.cuh"

namespace {

using namespace lora_fused::mag_norm_scale;

template <typename T>
void run(const torch::stable::Tensor& out, const torch::stable::Tensor& magnitude,
         const torch::stable::Tensor& norm, cudaStream_t stream) {
  const T unit = T(lora_fused::kScaleUnits) * std::numeric_limits<T>::epsilon();
  const int64_t count = norm.numel();
  const unsigned grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  mag_norm_scale_fwd_kernel<T><<<grid, kThreads, 0, stream>>>(
      static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(magnitude.const_data_ptr()),
      static_cast<const T*>(norm.const_data_ptr()), count, unit);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

torch::stable::Tensor mag_norm_scale_cuda(const torch::stable::Tensor& magnitude,
                                const torch::stable::Tensor& norm) {
  lora_fused::check_mag_norm_scale(magnitude, norm, /*cuda=*/true);
  const torch::stable::accelerator::DeviceGuard guard(norm.get_device_index());
  const torch::stable::Tensor out = torch::stable::empty_like(norm);
  if (norm.numel() == 0) return out;
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(norm.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  if (norm.scalar_type() == torch::headeronly::ScalarType::Double)
    run<double>(out, magnitude, norm, stream);
  else
    run<float>(out, magnitude, norm, stream);
  return out;
}
