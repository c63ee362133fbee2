#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

// Each op: one declaration per device; kernel-src/ says what it computes.
torch::stable::Tensor row_norm_cpu(const torch::stable::Tensor& weight,
                                   const torch::stable::Tensor& lora_a,
                                   const torch::stable::Tensor& lora_b, double scaling);
torch::stable::Tensor row_norm_cuda(const torch::stable::Tensor& weight,
                                    const torch::stable::Tensor& lora_a,
                                    const torch::stable::Tensor& lora_b, double scaling);

void dropout_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p,
                 torch::stable::Tensor out, bool accumulate);
void dropout_cuda(const torch::stable::Tensor& x, const torch::stable::Tensor& seed, double p,
                  torch::stable::Tensor out, bool accumulate);

std::tuple<std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>> lora_forward(
    const torch::stable::Tensor& x, std::vector<torch::stable::Tensor> weights,
    std::vector<std::optional<torch::stable::Tensor>> biases,
    std::vector<torch::stable::Tensor> lora_a, std::vector<torch::stable::Tensor> lora_b,
    std::vector<double> scalings, std::optional<torch::stable::Tensor> seed, double p,
    std::vector<int64_t> lead);
std::tuple<std::vector<torch::stable::Tensor>, std::vector<torch::stable::Tensor>,
           std::vector<torch::stable::Tensor>>
lora_backward(std::vector<torch::stable::Tensor> dys, const torch::stable::Tensor& x,
              std::optional<torch::stable::Tensor> t, std::vector<torch::stable::Tensor> weights,
              std::vector<torch::stable::Tensor> lora_a,
              std::vector<torch::stable::Tensor> lora_b, std::vector<double> scalings,
              std::optional<torch::stable::Tensor> seed, double p,
              std::optional<torch::stable::Tensor> dx, bool need_dx, std::vector<bool> needs_a,
              std::vector<bool> needs_b);
