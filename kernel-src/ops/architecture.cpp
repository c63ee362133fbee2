// Which architecture's kernels run, asked and set: for `explain`, tests and benchmarks.
#include "../dispatch/architecture.h"
#include "../../torch-ext/torch_binding.h"

std::string architecture(const torch::stable::Tensor& like) {
  return lora_fused::dispatch::name_of(lora_fused::dispatch::architecture_of(like));
}

void set_architecture(std::string name) { lora_fused::dispatch::set_architecture(name); }
