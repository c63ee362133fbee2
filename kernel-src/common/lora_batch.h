// What lora_batch.cpp needs of the device: many small conversions at once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace lora_fused {

// One conversion: contiguous tensors of the same number of elements.
struct Cast {
  torch::stable::Tensor from, to;
};

#if defined(CUDA_KERNEL)
// All conversions in as few launches as their number allows.
void cast_all_cuda(const std::vector<Cast>& casts);
#endif

}  // namespace lora_fused
