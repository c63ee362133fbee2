// What a group runs besides products, see passes.h.
#include "passes.h"

namespace lora_fused {

// float64 has no conversion kernel of ours: it is there to check results.
void cast_all(const std::vector<Cast>& casts) {
  if (casts.empty()) return;
  std::vector<Cast> fused;
  for (const auto& cast : casts) {
    const bool is_float64 =
        cast.from.scalar_type() == ScalarType::Double || cast.to.scalar_type() == ScalarType::Double;
    if (cast.to.is_cuda() && !is_float64)
      fused.push_back(cast);
    else if (cast.lo)
      lo_cpu(cast);
    else if (cast.transposed || !copy_small(cast.to, cast.from))
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(cast.to.tensor().get(), cast.from.tensor().get(), 0));
  }
#if defined(CUDA_KERNEL)
  if (!fused.empty()) cast_all_cuda(fused);
#endif
}

void sum_hi_lo(const std::vector<HiLoSum>& sums) {
  if (sums.empty()) return;
#if defined(CUDA_KERNEL)
  if (sums[0].out.is_cuda()) return hi_lo_sums_cuda(sums);
#endif
  hi_lo_sums_cpu(sums);
}

void scale_output(const ScaleOutput& work) {
#if defined(CUDA_KERNEL)
  if (work.y.is_cuda()) return scale_output_cuda(work);
#endif
  scale_output_cpu(work);
}

void scale_outputs_backward(const std::vector<ScaleOutputBackward>& works) {
  if (works.empty()) return;
#if defined(CUDA_KERNEL)
  if (works[0].dy.is_cuda()) return scale_output_backward_cuda(works);
#endif
  for (const ScaleOutputBackward& work : works) scale_output_backward_cpu(work);
}

void run_activation(const GatedActivation& work) {
#if defined(CUDA_KERNEL)
  if (work.h.is_cuda()) return gated_activation_cuda(work);
#endif
  gated_activation_cpu(work);
  scale_outputs_backward(passes_of(work));
}

void dequantize_4bit(const FourBit& weight, const Tensor& out) {
  if (weight.count == 0) return;
#if defined(CUDA_KERNEL)
  if (out.is_cuda()) return dequantize_4bit_cuda(weight, out.scalar_type(), out);
#endif
  dequantize_4bit_cpu(weight, out.scalar_type());
}

void drop(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate, bool scaled) {
#if defined(CUDA_KERNEL)
  if (x.is_cuda()) return dropout_cuda(x, mask, out, accumulate, scaled);
#endif
  dropout_cpu(x, mask, out, accumulate, scaled);
}

MatrixView dropped(const MatrixView& x, const Dropped& mask) {
  const MatrixView d = fresh_like(x);
  drop(x, mask, d, /*accumulate=*/false);
  return d;
}

MatrixView kept(const MatrixView& x, const std::optional<Dropped>& mask) {
  if (!mask) return x;
  const MatrixView d = fresh_like(x);
  drop(x, *mask, d, /*accumulate=*/false, /*scaled=*/false);
  return d;
}

}  // namespace lora_fused
