// column_norm on CUDA: norm[h] = sqrt(sum_v (W[v,h] + s * sum_r B[h,r] A[r,v])^2), fp32 [H], and magnitude / norm.
//
// W [V,H] in bf16 or fp16, H a multiple of 8; A [R,V], B [H,R] of one dtype, fp32 or W's, R up to 64; all
// contiguous. The vocabulary is dealt out to as many blocks as the GPU holds; a last kernel adds each
// column's partial sums in a fixed order, so results are deterministic on a given GPU. column_norm.cuh
// has the kernel and what it rounds; an A of float32 beside a float16 W must lie in that type's range.
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>

#include "../../common/embedding.h"
#include "../../common/tensors.h"
#include "../../dispatch/table.h"
#include "column_norm.cuh"
#include "../common/shared_memory.h"
#include "../common/stream.h"

namespace {

using namespace lora_fused::column_norm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename W, typename P, int kSteps, int kBlocks, bool kSplitA>
void run(Args p, const Tensor& norm, const lora_fused::MagNormScaleOut& scale_out) {
  using S = Shape<W, P, kSteps, kSplitA>;
  const auto kernel = column_norm_fwd_kernel<W, P, S, kBlocks>;
  const int device = norm.get_device_index();
  const cudaStream_t stream = lora_fused::stream_of(norm);
  static lora_fused::SharedMemory shared_memory;
  shared_memory.allow(kernel, S::kBytes, device);
  p.tiles = static_cast<int>((p.v + S::kRows - 1) / S::kRows);
  const int columns = (p.h + S::kCols - 1) / S::kCols;
  const int splits = std::clamp(kBlocks * lora_fused::multiprocessors(device) / columns, 1, std::max(p.tiles, 1));
  const int64_t grams = int64_t{splits} * S::kGramSize, sums = int64_t{splits} * p.h;
  const Tensor buffer = lora_fused::empty(norm, {grams + sums}, ScalarType::Float);
  p.grams = static_cast<float*>(buffer.mutable_data_ptr());
  p.partial = p.grams + grams;
  kernel<<<dim3(columns, splits), kThreads, S::kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  lora_fused::norm_finish_kernel<P, S::A::kRanks>
      <<<(p.h + lora_fused::kFinishThreads - 1) / lora_fused::kFinishThreads, lora_fused::kFinishThreads, 0, stream>>>(
          static_cast<float*>(norm.mutable_data_ptr()), p.partial, p.grams, static_cast<const P*>(p.b), p.scaling, p.h,
          p.r, splits, scale_out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename W, typename P, int kBlocks, bool kSplitA>
void run_rank(const Args& p, const Tensor& norm, const lora_fused::MagNormScaleOut& scale_out) {
  (p.r <= 32 ? run<W, P, 2, kBlocks, kSplitA> : run<W, P, 4, kBlocks, kSplitA>)(p, norm, scale_out);
}

template <typename W>
void run_adapter(const Args& p, ScalarType dtype, const Tensor& norm, const lora_fused::MagNormScaleOut& scale_out) {
  // With hi and lo one block a multiprocessor, for the registers that takes.
  const bool small = p.v <= lora_fused::dispatch::kColumnNormSplitRows;
  (dtype != ScalarType::Float ? run_rank<W, W, 2, false>
   : small                    ? run_rank<W, float, 1, true>
                              : run_rank<W, float, 2, false>)(p, norm, scale_out);
}

}  // namespace

void lora_fused::column_norm_sm80(const ColumnNorm& work) {
  const Tensor &weight = work.weight, &lora_a = work.lora_a;
  const auto dtype = lora_a.scalar_type();
  Args p{};
  p.w = weight.const_data_ptr(), p.a = lora_a.const_data_ptr(), p.b = work.lora_b.const_data_ptr();
  p.scaling = static_cast<float>(work.scaling);
  p.v = weight.size(0), p.h = static_cast<int>(weight.size(1));
  p.r = static_cast<int>(lora_a.size(0));
  p.a_vector = reinterpret_cast<uintptr_t>(p.a) % 16 == 0 && p.v * (dtype == ScalarType::Float ? 4 : 2) % 16 == 0;
  MagNormScaleOut scale_out{};
  if (work.magnitude)
    scale_out = {embedding::array_of(*work.magnitude, "magnitude"),
                 static_cast<float*>(work.mag_norm_scale->mutable_data_ptr()),
                 static_cast<float>(kScaleUnits) * std::numeric_limits<float>::epsilon()};
  (weight.scalar_type() == ScalarType::BFloat16 ? run_adapter<__nv_bfloat16> : run_adapter<__half>)(p, dtype, work.norm,
                                                                                                    scale_out);
}
