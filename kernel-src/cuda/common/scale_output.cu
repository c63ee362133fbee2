// Launches of scale_output.cuh, which says what they compute.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "scale_output.cuh"
#include "stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::scale_output;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename V>
V* data(const MaybeTensor& t) {
  return t ? static_cast<V*>(t->mutable_data_ptr()) : nullptr;
}

template <typename T>
void run(const ScaleOutput& s) {
  bool aligned = true;
  ScaleArguments<T> a{matrix<T>(s.unscaled, aligned), matrix<T>(s.y, aligned)};
  a.scale = vector<Wide<T>>(s.scale.scale);
  a.bias = vector<T>(s.scale.bias);
  const auto on_boundary = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  aligned = aligned && on_boundary(a.scale) && on_boundary(a.bias) && s.y.size(1) % kColumns == 0;
  a.cols = s.y.size(1);
  a.blocks = (a.cols + kColumns - 1) / kColumns;
  a.total = s.y.size(0) * a.blocks;
  a.form = s.form;
  if (a.total == 0) return;
  const int64_t grid = std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks);
  const auto kernel = aligned ? scale_output_fwd_kernel<T, true> : scale_output_fwd_kernel<T, false>;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream_of(s.y)>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t blocks_of(int64_t cols) { return (cols + kBlockColumns - 1) / kBlockColumns; }

template <typename T>
void launch(const ScaleOutputBackward* first, size_t count) {
  bool aligned = true, summed = false;
  int64_t blocks = 0, most = 0;
  SumArguments<T> a{};
  a.rows = first->dy.size(0);
  for (size_t i = 0; i < count; ++i) {
    const ScaleOutputBackward& s = first[i];
    Pass<T>& pass = a.pass[i];
    pass = {matrix<T>(s.dy, aligned), matrix<T>(s.unscaled, aligned), matrix<T>(s.dunscaled, aligned)};
    pass.scale = vector<Wide<T>>(s.scale.scale);
    pass.norm = vector<Wide<T>>(s.norm);
    pass.bias = vector<T>(s.scale.bias);
    pass.dmagnitude = data<Wide<T>>(s.dmagnitude);
    pass.dbias = data<Wide<T>>(s.dbias);
    pass.cols = s.dy.size(1);
    pass.column = a.columns;
    aligned = aligned && pass.cols % kColumns == 0;
    summed = summed || s.dmagnitude || s.dbias;
    blocks += blocks_of(pass.cols);
    a.columns += pass.cols;
    most = std::max(most, pass.cols);
  }
  if (blocks == 0) return;
  a.share_rows = dispatch::scale_backward_rows(blocks, a.rows);
  a.shares = std::max<int64_t>(1, (a.rows + a.share_rows - 1) / a.share_rows);
  const auto dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor shares = empty(first->dy.base(), {summed ? 2 : 0, a.shares, a.columns}, dtype);
  a.dot_shares = static_cast<Wide<T>*>(shares.mutable_data_ptr());
  a.sum_shares = a.dot_shares + a.shares * a.columns;
  const cudaStream_t stream = stream_of(first->dy);
  const dim3 grid(static_cast<unsigned>(blocks_of(most)), static_cast<unsigned>(a.shares),
                  static_cast<unsigned>(count));
  const auto kernel = aligned ? scale_output_bwd_kernel<T, true> : scale_output_bwd_kernel<T, false>;
  kernel<<<grid, kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!summed) return;
  const dim3 reducers(static_cast<unsigned>((most + kReduceColumns - 1) / kReduceColumns),
                      static_cast<unsigned>(count));
  scale_output_bwd_reduce_kernel<T><<<reducers, kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const std::vector<ScaleOutputBackward>& all) {
  for (size_t first = 0; first < all.size(); first += kPasses)
    launch<T>(all.data() + first, std::min<size_t>(kPasses, all.size() - first));
}

}  // namespace

void lora_fused::scale_output_cuda(const ScaleOutput& work) {
  LORA_FUSED_FLOATING(work.y.scalar_type(), "scale_output", [&] { run<CudaType<scalar_t>>(work); });
}

void lora_fused::scale_output_backward_cuda(const std::vector<ScaleOutputBackward>& works) {
  LORA_FUSED_FLOATING(works[0].dy.scalar_type(), "scale_output_backward", [&] { run<CudaType<scalar_t>>(works); });
}
