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
Architecture of_device(int index) {
  const int capability = device_of(index).capability;
  return capability == 90 ? Architecture::kSm90 : capability >= 80 ? Architecture::kSm80 : Architecture::kSm75;
}
#endif

// What every GPU of the process can run.
std::vector<Architecture> possible() {
  std::vector<Architecture> found;
#if defined(CUDA_KERNEL)
  for (const Architecture architecture : {Architecture::kSm75, Architecture::kSm80, Architecture::kSm90}) {
    bool all = device_count() > 0;
    for (int i = 0; i < device_count(); ++i) all = all && of_device(i) >= architecture;
    if (all) found.push_back(architecture);
  }
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

void check_has_sm80(const torch::stable::Tensor& like, const char* op) {
  STD_TORCH_CHECK(has_sm80(like), op, ": expected a GPU of compute capability 8.0 or later");
}

std::string name_of(Architecture architecture) {
  switch (architecture) {
    case Architecture::kSm75: return "sm75";
    case Architecture::kSm80: return "sm80";
    case Architecture::kSm90: return "sm90";
    default: return "cpu";
  }
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
