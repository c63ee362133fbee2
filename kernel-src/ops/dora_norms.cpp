// DoRA's norms and gains of several projections, as an op of their own.
#include <tuple>

#include "../../torch-ext/torch_binding.h"
#include "../group/dora_norms.h"

std::tuple<lora_fused::Tensors, lora_fused::Tensors> dora_gains(
    lora_fused::Tensors weights, lora_fused::Tensors lora_a, lora_fused::Tensors lora_b, lora_fused::Tensors magnitudes,
    std::vector<double> scalings, lora_fused::Tensors scales, std::vector<int64_t> quantized) {
  using lora_fused::Optionals;
  const lora_fused::OnDevice device(weights[0]);
  const Optionals a(lora_a.begin(), lora_a.end()), b(lora_b.begin(), lora_b.end());
  const Optionals biases, of(magnitudes.begin(), magnitudes.end());
  const std::optional<torch::stable::Tensor> seeds;
  const std::vector<double> dropouts;
  Optionals gains;
  const lora_fused::Lists lists{weights, biases, a, b, gains, scalings, seeds, dropouts, scales, quantized, /*exact=*/false};
  lists.check();
  const lora_fused::Norms norms(lists, of, gains, /*product=*/std::nullopt);
  return {norms.norms(), norms.gains()};
}
