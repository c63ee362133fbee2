// Which kernels a device runs, see architecture.h.
#include "architecture.h"

#include <atomic>
#include <vector>

#if defined(CUDA_KERNEL)
#include "device.h"
#endif

namespace lora_fused::dispatch {

namespace {

// As `set_architecture` says; kCpu: each device's own.
std::atomic<Architecture> chosen{Architecture::kCpu};

#if defined(CUDA_KERNEL)
Architecture of_device(int index) { return device_of(index).is_hopper ? Architecture::kSm90 : Architecture::kSm80; }
#endif

// What every GPU of the process can run.
std::vector<Architecture> possible() {
  std::vector<Architecture> found;
#if defined(CUDA_KERNEL)
  bool all_sm90 = device_count() > 0;
  for (int i = 0; i < device_count(); ++i) all_sm90 = all_sm90 && of_device(i) == Architecture::kSm90;
  if (device_count() > 0) found.push_back(Architecture::kSm80);
  if (all_sm90) found.push_back(Architecture::kSm90);
#endif
  return found;
}

template <typename Like>
Architecture architecture_like(const Like& like) {
#if defined(CUDA_KERNEL)
  if (!like.is_cuda()) return Architecture::kCpu;
  const Architecture set = chosen.load(std::memory_order_relaxed);
  return set == Architecture::kCpu ? of_device(like.get_device_index()) : set;
#else
  static_cast<void>(like);
  return Architecture::kCpu;
#endif
}

}  // namespace

Architecture architecture_of(const torch::stable::Tensor& like) { return architecture_like(like); }
Architecture architecture_of(const MatrixView& like) { return architecture_like(like); }

std::string name_of(Architecture architecture) {
  return architecture == Architecture::kCpu ? "cpu" : architecture == Architecture::kSm80 ? "sm80" : "sm90";
}

void set_architecture(const std::string& name) {
  if (name.empty()) {
    chosen = Architecture::kCpu;
    return;
  }
  std::string names = "\"\"";
  for (const Architecture architecture : possible()) {
    if (name_of(architecture) == name) {
      chosen = architecture;
      return;
    }
    names += ", \"" + name_of(architecture) + "\"";
  }
  STD_TORCH_CHECK(false, "set_architecture: \"", name, "\" is not what this process can run, expected one of ", names);
}

}  // namespace lora_fused::dispatch
