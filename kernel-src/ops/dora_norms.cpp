// DoRA's norms, of one projection or with the scales of several, as ops of their own.
#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "../group/dora_norms.h"

std::tuple<lora_fused::Tensors, lora_fused::Tensors> dora_scales(
    lora_fused::Tensors weights, lora_fused::Tensors lora_a, lora_fused::Tensors lora_b, lora_fused::Tensors magnitudes,
    std::vector<double> scalings, lora_fused::Tensors scales, std::vector<int64_t> quantized) {
  using lora_fused::Optionals;
  const lora_fused::OnDevice device(weights[0]);
  const Optionals a(lora_a.begin(), lora_a.end()), b(lora_b.begin(), lora_b.end());
  const Optionals biases, of(magnitudes.begin(), magnitudes.end());
  const std::optional<torch::stable::Tensor> seeds;
  const std::vector<double> dropouts;
  Optionals mag_norm_scales;
  const lora_fused::GroupArgs args{weights, biases, a, b, mag_norm_scales, scalings, seeds, dropouts, scales, quantized, /*bf16x3=*/false};
  args.check();
  const lora_fused::Norms norms(args, of, mag_norm_scales, /*product=*/std::nullopt);
  return {norms.norms(), norms.mag_norm_scales()};
}

#if defined(CUDA_KERNEL)
torch::stable::Tensor row_norm_cuda(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                                    const torch::stable::Tensor& lora_b, double scaling) {
  const lora_fused::OnDevice device(weight);
  const auto norm = lora_fused::empty(weight, {weight.size(0)}, lora_fused::ScalarType::Float);
  lora_fused::row_norms_cuda({{weight, lora_a, lora_b, norm, scaling}});
  return norm;
}
#endif
