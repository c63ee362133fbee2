// The launch of column_sums.cuh.
#include "column_sums.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

namespace lora_fused {

template <typename W>
void add_shares(const ColumnSums<W>& all, int count, cudaStream_t stream) {
  if (all.dots == nullptr && all.sums == nullptr) return;
  int64_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, all.of[i].cols);
  const dim3 grid(static_cast<unsigned>((most + kSumColumns - 1) / kSumColumns), static_cast<unsigned>(count));
  add_shares_kernel<W><<<grid, kColumnThreads, 0, stream>>>(all);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template void add_shares(const ColumnSums<float>&, int, cudaStream_t);
template void add_shares(const ColumnSums<double>&, int, cudaStream_t);

}  // namespace lora_fused
