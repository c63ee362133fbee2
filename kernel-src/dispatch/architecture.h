// Which kernels a device runs: the one place that tells GPUs apart.
//
// An architecture is a folder of kernels: cuda/sm80 runs on every GPU from compute capability 8.0 on, cuda/sm90 on
// Hopper alone (9.0: wgmma and TMA as sm_90a has them). To add one: a folder, a name here, and entries in table.h.
#pragma once

#include <string>

#include "../common/matrix_view.h"

namespace lora_fused::dispatch {

enum class Architecture { kCpu, kSm80, kSm90 };

// Of the device that a tensor or a matrix is on, or what `set_architecture` says.
Architecture architecture_of(const torch::stable::Tensor& like);
Architecture architecture_of(const MatrixView& like);

inline bool is_sm90(const MatrixView& like) { return architecture_of(like) == Architecture::kSm90; }

// "cpu", "sm80" or "sm90".
std::string name_of(Architecture architecture);

// From now on every GPU of the process runs this architecture's kernels; "" for each device's own. An error where the
// name is unknown or a GPU cannot run it, and in a build or a process without a GPU.
void set_architecture(const std::string& name);

}  // namespace lora_fused::dispatch
