// DoRA's scale magnitude / norm on the CPU, see common/mag_norm_scale.h.
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "../common/dtypes.h"
#include "../common/kernels.h"
#include "../common/mag_norm_scale.h"

namespace {

template <typename T>
void run(const torch::stable::Tensor& out, const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm) {
  const T unit = T(lora_fused::kScaleUnits) * std::numeric_limits<T>::epsilon();
  const T *m = static_cast<const T*>(magnitude.const_data_ptr()), *n = static_cast<const T*>(norm.const_data_ptr());
  T* g = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < norm.numel(); ++i) g[i] = lora_fused::mag_norm_scale_of<T>(m[i], n[i], unit);
}

}  // namespace

void lora_fused::mag_norm_scale_cpu(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm,
                                    const torch::stable::Tensor& out) {
  lora_fused::check_mag_norm_scale(magnitude, norm, /*cuda=*/false);
  LORA_FUSED_WIDE(norm.scalar_type(), "mag_norm_scale", [&] { run<scalar_t>(out, magnitude, norm); });
}
