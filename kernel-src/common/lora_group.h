// What lora_group.cpp needs of the device: many small conversions at once, the gated activation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace lora_fused {

// One conversion: contiguous tensors of the same number of elements.
struct Cast {
  torch::stable::Tensor from, to;
};

enum Activation : int64_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// Matrices [M, I] with contiguous rows: gate and up may be halves of wider ones, and so may their
// gradients. Without dh the forward, h = f(gate)·up; else dgate, dup and h.
struct Gated {
  torch::stable::Tensor gate, up, h;
  std::optional<torch::stable::Tensor> dh, dgate, dup;
  int64_t activation;
};

void gated_cpu(const Gated& gated);

#if defined(CUDA_KERNEL)
// All conversions in as few launches as their number allows.
void cast_all_cuda(const std::vector<Cast>& casts);
void gated_cuda(const Gated& gated);
#endif

}  // namespace lora_fused
