// The launch of dropout.cuh, which says what it computes.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../../common/kernels.h"
#include "dropout.cuh"
#include "stream.h"

namespace {

using namespace lora_fused;
using namespace lora_fused::dropout;

template <typename Out, typename In>
void drop(const MatrixView& out, const Matrix<In>& x, const int64_t* seed, const Keep& keep, bool accumulate,
          bool aligned) {
  Arguments<In, Out> a{
      x, matrix<Out>(out, aligned), seed, out.size(1), (out.size(1) + kColumns - 1) / kColumns, 0, keep, accumulate};
  a.total = out.size(0) * a.blocks;
  if (a.total == 0) return;
  const int64_t grid = std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks);
  const auto kernel =
      aligned && a.cols % kColumns == 0 ? dropout_fwd_kernel<In, Out, true> : dropout_fwd_kernel<In, Out, false>;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream_of(out)>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In>
void drop_to(const MatrixView& out, const MatrixView& x, const int64_t* seed, const Keep& keep, bool accumulate) {
  bool aligned = true;
  const Matrix<In> from = matrix<In>(x, aligned);
  LORA_FUSED_FLOATING(out.scalar_type(), "dropout",
                      [&] { drop<CudaType<scalar_t>>(out, from, seed, keep, accumulate, aligned); });
}

}  // namespace

void lora_fused::dropout_cuda(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate,
                              bool scaled) {
  const Keep keep(mask.p, scaled);
  const auto* seed = static_cast<const int64_t*>(mask.seed.const_data_ptr());
  LORA_FUSED_FLOATING(x.scalar_type(), "dropout", [&] { drop_to<CudaType<scalar_t>>(out, x, seed, keep, accumulate); });
}
