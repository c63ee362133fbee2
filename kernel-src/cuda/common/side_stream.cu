// The streams of common/side_stream.h.
#include "../../common/side_stream.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <mutex>
#include <vector>

#include "../../dispatch/device.h"
#include "stream.h"

namespace lora_fused {

namespace {

struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t begun = nullptr, done = nullptr;
};

// Of one GPU, those that no call has; they live as long as the process. One that a capture has taken is that capture's
// until it ends.
struct Pool {
  std::mutex mutex;
  std::vector<Side*> free;
};

struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
};

Capture capture_of(cudaStream_t stream) {
  Capture found;
  STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &found.status, &found.id));
  return found;
}

Pool& pool_of(int device) {
  static std::vector<Pool>* const pools = new std::vector<Pool>(device_count());
  return pools->at(device);
}

cudaEvent_t new_event() {
  cudaEvent_t event = nullptr;
  STD_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

Side* take(int device, cudaStream_t beside) {
  Pool& pool = pool_of(device);
  const std::lock_guard<std::mutex> lock(pool.mutex);
  const Capture wanted = capture_of(beside);
  for (auto side = pool.free.rbegin(); side != pool.free.rend(); ++side) {
    const Capture found = capture_of((*side)->stream);
    if (found.status != cudaStreamCaptureStatusNone && (found.status != wanted.status || found.id != wanted.id))
      continue;
    Side* const taken = *side;
    pool.free.erase(std::next(side).base());
    return taken;
  }
  Side* const made = new Side;
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking));
  made->begun = new_event(), made->done = new_event();
  return made;
}

}  // namespace

void* SideStream::taken() {
  if (taken_ == nullptr) taken_ = take(like_.get_device_index(), stream_of(like_));
  return taken_;
}

SideStream::~SideStream() {
  if (taken_ == nullptr) return;
  Pool& pool = pool_of(like_.get_device_index());
  const std::lock_guard<std::mutex> lock(pool.mutex);
  pool.free.push_back(static_cast<Side*>(taken_));
}

cudaEvent_t SideStream::begun() { return static_cast<Side*>(taken())->begun; }

cudaStream_t SideStream::forked() {
  const Side& side = *static_cast<Side*>(taken());
  if (!waits_) STD_CUDA_CHECK(cudaStreamWaitEvent(side.stream, side.begun, 0));
  waits_ = true;
  return side.stream;
}

void SideStream::join() {
  const Side& side = *static_cast<Side*>(taken());
  STD_CUDA_CHECK(cudaEventRecord(side.done, side.stream));
  STD_CUDA_CHECK(cudaStreamWaitEvent(stream_of(like_), side.done, 0));
}

}  // namespace lora_fused
