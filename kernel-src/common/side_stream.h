// Kernels beside a product: in the multiprocessors that its last round of tiles leaves idle.
#pragma once

#include "matrix_view.h"

struct CUevent_st;   // *cudaEvent_t
struct CUstream_st;  // *cudaStream_t

namespace lora_fused {

#if defined(CUDA_KERNEL)
// A stream beside torch's current one of a GPU. A launch on the current stream records `begun` when all of its blocks
// run. What goes to `forked` after that waits for it, and so takes what it leaves; after `join` the current stream waits
// for all of that. Works in a stream capture as well, where it becomes a branch of the graph.
//
// What the launch reads and its caller gives back meanwhile is free memory to the current stream alone: everything that
// goes to `forked` is allocated before the launch.
class SideStream {
 public:
  explicit SideStream(const MatrixView& like) : like_(like) {}
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  // The event for a launch, which calls `started` after it.
  CUevent_st* begun();
  void started() { started_ = true; }
  // Whether there is a launch to run beside.
  bool is_started() const { return started_; }
  CUstream_st* forked();
  void join();

 private:
  void* taken();
  const MatrixView& like_;
  void* taken_ = nullptr;  // of the pool in side_stream.cu
  bool started_ = false, waits_ = false;
};
#else
struct SideStream {
  explicit SideStream(const MatrixView&) {}
};
#endif

}  // namespace lora_fused
