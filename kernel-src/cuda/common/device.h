// What the host asks of a device, once, and the shared memory that kernels may take there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace lora_fused {

struct Device {
  int multiprocessors;
  int shared_memory, shared_memory_of_block;  // bytes of a multiprocessor, and the most that a block may ask for
  bool is_hopper;
};

inline const std::vector<Device>& devices() {
  static const std::vector<Device> all = [] {
    int count = 0;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<Device> found;
    for (int i = 0; i < count; ++i) {
      const auto ask = [&](cudaDeviceAttr which) {
        int value = 0;
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, i));
        return value;
      };
      found.push_back({ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                       ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                       ask(cudaDevAttrComputeCapabilityMajor) == 9 && ask(cudaDevAttrComputeCapabilityMinor) == 0});
    }
    return found;
  }();
  return all;
}

inline const Device& device_of(int index) { return devices().at(index); }
inline int multiprocessors(int device) { return device_of(device).multiprocessors; }
inline bool is_hopper(int device) { return device_of(device).is_hopper; }

// Dynamic shared memory of one kernel, where it needs more than it gets unasked: asked for when it grows, since every
// question costs host time. One object for each kernel, which lives as long as the process.
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
  std::vector<std::atomic<int>> allowed_ = std::vector<std::atomic<int>>(devices().size());
};

}  // namespace lora_fused
