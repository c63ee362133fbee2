// Which kernels a device runs: the one place that tells GPUs apart.
//
// An architecture is a folder of kernels: cuda/sm80 runs on every GPU from compute capability 8.0 on (cp.async, products
// of bfloat16), cuda/sm90 on Hopper alone (9.0: wgmma and TMA as sm_90a has them). sm75 is none of them: what is left
// are cuda/common and the library's products, of float16, float32 and float64. To add one: a folder, a name here, and
// entries in table.h.
#pragma once

#include <string>

#include "../common/matrix_view.h"

namespace lora_fused::dispatch {

enum class Architecture { kCpu, kSm75, kSm80, kSm90 };  // later ones run what earlier ones do

// Of the device that a tensor or a matrix is on, or what `set_architecture` says.
Architecture architecture_of(const torch::stable::Tensor& like);
Architecture architecture_of(const MatrixView& like);

inline bool is_sm90(const MatrixView& like) { return architecture_of(like) == Architecture::kSm90; }
template <typename Like>
bool has_sm80(const Like& like) {
  return architecture_of(like) >= Architecture::kSm80;
}
// An error that names the op where the GPU of `like` has no kernels of cuda/sm80.
void check_has_sm80(const torch::stable::Tensor& like, const char* op);

// "cpu", "sm75", "sm80" or "sm90".
std::string name_of(Architecture architecture);

// From now on every GPU of the process runs this architecture's kernels; "" for each device's own. An error where the
// name is unknown or a GPU cannot run it, and in a build or a process without a GPU.
void set_architecture(const std::string& name);

}  // namespace lora_fused::dispatch
