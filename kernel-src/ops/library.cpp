// What the library says of itself: the names of what its ops take as numbers, and which architecture's kernels run,
// which tests and benchmarks can set.
#include "../dispatch/architecture.h"
#include "../../torch-ext/torch_binding.h"
#include "../common/names.h"

std::string names(std::string kind) { return lora_fused::names_of(kind); }

std::string architecture(const torch::stable::Tensor& like) {
  return lora_fused::dispatch::name_of(lora_fused::dispatch::architecture_of(like));
}

void set_architecture(std::string name) { lora_fused::dispatch::set_architecture(name); }
