// What the host asks of a GPU, once a process. In CUDA builds alone.
#pragma once

namespace lora_fused {

struct Device {
  int multiprocessors;
  int shared_memory, shared_memory_of_block;  // bytes of a multiprocessor, and the most that a block may ask for
  int capability;                             // 90 of compute capability 9.0, whose instructions sm_90a code has
};

int device_count();
const Device& device_of(int index);
// Whether launches can record an event once all their blocks run: CUDA 12.3's drivers and later ones, while builds for
// 12.6 run with those of 12.0 on.
bool has_launch_completion_events();
inline int multiprocessors(int device) { return device_of(device).multiprocessors; }

}  // namespace lora_fused
