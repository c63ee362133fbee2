// What the host asks of a GPU, see device.h.
#include "device.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

namespace lora_fused {

namespace {

const std::vector<Device>& devices() {
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
                       10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor)});
    }
    return found;
  }();
  return all;
}

}  // namespace

int device_count() { return static_cast<int>(devices().size()); }
const Device& device_of(int index) { return devices().at(index); }

bool has_launch_completion_events() {
  static const bool has = [] {
    int version = 0;
    STD_CUDA_CHECK(cudaDriverGetVersion(&version));
    return version >= 12030;
  }();
  return has;
}

}  // namespace lora_fused
