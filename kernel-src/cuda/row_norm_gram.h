// row_norm of a bfloat16 W and float32 adapters of small rank, see row_norm_gram.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace lora_fused {

// Whether it takes these, all on one GPU and of shapes that match.
bool row_norm_gram_fits(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                        const torch::stable::Tensor& lora_b);

// ‖W + s·B·A‖ by row, fp32 [N].
torch::stable::Tensor row_norm_gram(const torch::stable::Tensor& weight, const torch::stable::Tensor& lora_a,
                                    const torch::stable::Tensor& lora_b, double scaling);

}  // namespace lora_fused
