// The stream that work on a tensor's GPU goes to.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

namespace lora_fused {

// torch's current stream of the GPU that a tensor or a view of one is on.
template <typename T>
cudaStream_t stream_of(const T& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace lora_fused
