// DoRA's norms and scales, as a forward needs them before and beside its products.
#pragma once

#include "members.h"

namespace lora_fused {

// Norms and mag_norm_scales [N] in float32 of the members that have a magnitude [N] in float32, contiguous. That of a
// weight in four bits is made from what its product needs in floating point anyway, or some rows at a time where there
// is no product in its dtype.
class Norms {
 public:
  // `args` gets the mag_norm_scales that are made here. `product`: the dtype that weights have in `from_weight`, none
  // where it is not called.
  Norms(GroupArgs& args, std::optional<ScalarType> product);

  // Makes what waits for this weight, member `index` of the lists, in floating point.
  void from_weight(size_t index, const Tensor& weight) const;

  // In the order of the members that have them.
  const Tensors& norms() const { return norms_; }
  const Tensors& mag_norm_scales() const { return mag_norm_scales_; }

 private:
  Tensors norms_, mag_norm_scales_;
  std::vector<std::optional<RowNorm>> waiting_;  // one a member, or empty
};

#if defined(CUDA_KERNEL)
// All of them, each by the kernel that is faster.
void row_norms_cuda(const std::vector<RowNorm>& norms);
#endif

}  // namespace lora_fused
