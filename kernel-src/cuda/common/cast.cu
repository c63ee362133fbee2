// Launches of cast.cuh, which says what they compute: many tensors in each.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "cast.cuh"
#include "stream.h"

namespace {

using namespace lora_fused::cast;
using torch::headeronly::ScalarType;

Piece piece_of(const lora_fused::Cast& cast) {
  Piece p{};
  p.from = cast.from.const_data_ptr();
  p.to = cast.to.mutable_data_ptr();
  p.rows = cast.from.size(0);
  p.cols = cast.from.size(1);
  p.stride = cast.to.stride(0);
  p.transposed = cast.transposed;
  p.lo = cast.lo;
  p.from_dtype = lora_fused::dtype_code(cast.from.scalar_type(), "cast");
  p.to_dtype = lora_fused::dtype_code(cast.to.scalar_type(), "cast");
  const bool whole_rows = p.transposed || p.stride == p.cols || (p.cols % kElements == 0 && p.stride % kElements == 0);
  p.vector = whole_rows && (reinterpret_cast<uintptr_t>(p.from) | reinterpret_cast<uintptr_t>(p.to)) % 16 == 0;
  return p;
}

Sum sum_of(const lora_fused::HiLoSum& of) {
  Sum s{};
  s.hi = static_cast<const float*>(of.hi.const_data_ptr());
  s.lo = static_cast<const float*>(of.lo.const_data_ptr());
  s.out = of.out.mutable_data_ptr();
  s.scaling = static_cast<float>(of.scaling);
  s.rows = of.hi.size(0), s.cols = of.hi.size(1);
  s.from_stride = of.hi.stride(0), s.to_stride = of.out.stride(0);
  if (of.split) s.split_ranks = of.split->ranks, s.split_stride = of.split->stride;
  STD_TORCH_CHECK(of.out.scalar_type() == (of.split ? ScalarType::BFloat16 : ScalarType::Float),
                  "hi_lo_sums: expected split sums in bfloat16, others in float32");
  return s;
}

}  // namespace

void lora_fused::hi_lo_sums_cuda(const std::vector<HiLoSum>& sums) {
  const cudaStream_t stream = stream_of(sums[0].hi);
  for (size_t first = 0; first < sums.size(); first += kSums) {
    const size_t count = std::min<size_t>(kSums, sums.size() - first);
    Sums arguments{};
    int64_t most = 1;
    for (size_t i = 0; i < count; ++i) {
      arguments.sum[i] = sum_of(sums[first + i]);
      most = std::max(most, arguments.sum[i].rows * arguments.sum[i].cols);
    }
    const dim3 grid(static_cast<unsigned>(std::min((most + kThreads - 1) / kThreads, kPieces)),
                    static_cast<unsigned>(count));
    hi_lo_sum_fwd_kernel<<<grid, kThreads, 0, stream>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void lora_fused::cast_all_cuda(const std::vector<Cast>& casts) {
  const cudaStream_t stream = stream_of(casts[0].from);
  for (size_t first = 0; first < casts.size(); first += kTensors) {
    const size_t tensors = std::min<size_t>(kTensors, casts.size() - first);
    Pieces pieces{};
    int64_t most = 1;  // threads
    for (size_t i = 0; i < tensors; ++i) {
      pieces.piece[i] = piece_of(casts[first + i]);
      const Piece& p = pieces.piece[i];
      most = std::max(most, p.transposed ? p.rows : (p.rows * p.cols + kElements - 1) / kElements);
    }
    const int64_t blocks = std::min((most + kThreads - 1) / kThreads, kPieces);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tensors));
    cast_fwd_kernel<<<grid, kThreads, 0, stream>>>(pieces);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}
