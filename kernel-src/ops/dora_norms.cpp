// DoRA's norms and scales, of one projection or of several, as ops of their own.
#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "../group/dora_norms.h"

std::tuple<lora_fused::Tensors, lora_fused::Tensors> dora_scales(
    lora_fused::Tensors weights, lora_fused::Tensors lora_a, lora_fused::Tensors lora_b, lora_fused::Tensors magnitudes,
    std::vector<double> scalings, lora_fused::Tensors scales, std::vector<int64_t> quantized) {
  const lora_fused::OnDevice device(weights[0]);
  lora_fused::Optionals operands;
  for (size_t i = 0; i < weights.size(); ++i)
    operands.insert(operands.end(), {weights[i], std::nullopt, lora_a[i], lora_b[i], magnitudes[i], std::nullopt});
  operands.insert(operands.end(), scales.begin(), scales.end());
  const std::optional<torch::stable::Tensor> seeds;
  const lora_fused::Numbers dropouts;
  const lora_fused::Integers numbers = quantized.empty() ? std::nullopt : lora_fused::Integers(quantized);
  lora_fused::GroupArgs args{operands, scalings, seeds, dropouts, numbers, /*bf16x3=*/false};
  args.check();
  const lora_fused::Norms norms(args, /*product=*/std::nullopt);
  return {norms.norms(), norms.mag_norm_scales()};
}

torch::stable::Tensor row_norm(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                               const torch::stable::Tensor& lora_b, double scaling) {
  const lora_fused::OnDevice device(weight);
  const auto norm = lora_fused::empty(weight, {weight.dim() > 0 ? weight.size(0) : 1}, lora_fused::ScalarType::Float);
#if defined(CUDA_KERNEL)
  if (weight.is_cuda() || lora_a.is_cuda() || lora_b.is_cuda()) {
    lora_fused::row_norms_cuda({{weight, lora_a, lora_b, norm, scaling}});
    return norm;
  }
#endif
  lora_fused::row_norm_cpu(weight, lora_a, lora_b, scaling, norm);
  return norm;
}

torch::stable::Tensor mag_norm_scale(const torch::stable::Tensor& magnitude, const torch::stable::Tensor& norm) {
#if defined(CUDA_KERNEL)
  if (magnitude.is_cuda() || norm.is_cuda()) {
    const lora_fused::OnDevice device(norm);
    return lora_fused::mag_norm_scale_cuda(magnitude, norm);
  }
#endif
  const auto out = lora_fused::empty(norm, {norm.numel()}, norm.scalar_type());
  lora_fused::mag_norm_scale_cpu(magnitude, norm, out);
  return out;
}
