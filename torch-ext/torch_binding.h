#pragma once

#include <torch/csrc/stable/tensor.h>

// Each op: one declaration per device; kernel-src/ says what it computes.
torch::stable::Tensor row_norm_cpu(const torch::stable::Tensor& weight,
                                   const torch::stable::Tensor& lora_a,
                                   const torch::stable::Tensor& lora_b, double scaling);
torch::stable::Tensor row_norm_cuda(const torch::stable::Tensor& weight,
                                    const torch::stable::Tensor& lora_a,
                                    const torch::stable::Tensor& lora_b, double scaling);

void dropout_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p,
                 torch::stable::Tensor out);
void dropout_cuda(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p,
                  torch::stable::Tensor out);
