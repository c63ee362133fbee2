// Launches of scale_output.cuh, which says what they compute.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "scale_output.cuh"

namespace {

using namespace lora_fused;
using namespace lora_fused::scale_output;
using torch::stable::Tensor;

template <typename T>
void run(const ScaleOutput& s) {
  bool aligned = s.y.size(1) % kColumns == 0;
  ScaleArguments<T> a{matrix<T>(s.unscaled, aligned), matrix<T>(s.y, aligned)};
  a.scale = vector<Wide<T>>(s.scale.scale, aligned);
  a.bias = vector<T>(s.scale.bias, aligned);
  a.form = s.form;
  a.cut = row_shares(s.y.size(0), s.y.size(1), shares_to_fill(s.y, s.y.size(1), dispatch::kScaleBlocks));
  if (a.cut.threads() == 0) return;
  const auto kernel = aligned ? scale_output_fwd_kernel<T, true> : scale_output_fwd_kernel<T, false>;
  kernel<<<blocks_of(a.cut), kColumnThreads, 0, stream_of(s.y)>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch(const ScaleOutputBackward* first, size_t count) {
  bool aligned = true;
  int64_t columns = 0;
  unsigned blocks = 0;
  SumArguments<T> a{};
  for (size_t i = 0; i < count; ++i) columns += first[i].dy.size(1);
  const int64_t shares = shares_to_fill(first->dy, columns, dispatch::kScaleBackwardBlocks);
  for (size_t i = 0; i < count; ++i) {
    const ScaleOutputBackward& s = first[i];
    aligned = aligned && s.dy.size(1) % kColumns == 0;
    a.pass[i] = {matrix<T>(s.dy, aligned),         matrix<T>(s.unscaled, aligned),
                 matrix<T>(s.dunscaled, aligned),  vector<Wide<T>>(s.scale.scale, aligned),
                 vector<T>(s.scale.bias, aligned), row_shares(s.dy.size(0), s.dy.size(1), shares)};
    a.sums.of[i] = column_sum<Wide<T>>(s.dy, s, a.sums);
    blocks = std::max(blocks, blocks_of(a.pass[i].cut));
  }
  if (blocks == 0) return;
  const cudaStream_t stream = stream_of(first->dy);
  const Tensor memory = share_memory(a.sums, static_cast<int>(count), a.pass[0].cut.shares, first->dy.base());
  const auto kernel = aligned ? scale_output_bwd_kernel<T, true> : scale_output_bwd_kernel<T, false>;
  kernel<<<dim3(blocks, static_cast<unsigned>(count)), kColumnThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  add_shares(a.sums, static_cast<int>(count), stream);
}

template <typename T>
void run(const std::vector<ScaleOutputBackward>& all) {
  for (size_t first = 0; first < all.size(); first += kMostSums)
    launch<T>(all.data() + first, std::min<size_t>(kMostSums, all.size() - first));
}

}  // namespace

void lora_fused::scale_output_cuda(const ScaleOutput& work) {
  LORA_FUSED_FLOATING(work.y.scalar_type(), "scale_output", [&] { run<CudaType<scalar_t>>(work); });
}

void lora_fused::scale_output_backward_cuda(const std::vector<ScaleOutputBackward>& works) {
  LORA_FUSED_FLOATING(works[0].dy.scalar_type(), "scale_output_backward", [&] { run<CudaType<scalar_t>>(works); });
}
