// Dynamic shared memory of a kernel that needs more than it gets unasked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <mutex>
#include <vector>

#include "../../dispatch/device.h"

namespace lora_fused {

// Asks when the need grows, since every question costs host time. One object for each kernel, which lives as long as
// the process.
class SharedMemory {
 public:
  // On `device`, which is current.
  template <typename Kernel>
  void allow(Kernel kernel, int bytes, int device) {
    std::atomic<int>& allowed = allowed_.at(device);
    if (allowed >= bytes) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (allowed >= bytes) return;
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    allowed = bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<std::atomic<int>> allowed_ = std::vector<std::atomic<int>>(device_count());
};

}  // namespace lora_fused
