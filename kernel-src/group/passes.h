// What a group runs besides products, on the device that its operands are on: conversions, dropout, DoRA's scale.
#pragma once

#include <optional>
#include <vector>

#include "../common/kernels.h"
#include "../common/tensors.h"

namespace lora_fused {

void cast_all(const std::vector<Cast>& casts);
void sum_hi_lo(const std::vector<HiLoSum>& sums);
void scale_output(const ScaleOutput& work);
void scale_outputs_backward(const std::vector<ScaleOutputBackward>& works);
void run_activation(const GatedActivation& work);

// `weight`, whose out `out` is.
void dequantize_4bit(const FourBit& weight, const Tensor& out);

// out = D(x), or += it, without the factor 1 / (1 - p) where not `scaled`.
void drop(const MatrixView& x, const Dropped& mask, const MatrixView& out, bool accumulate, bool scaled = true);

// D(x), a copy.
MatrixView dropped(const MatrixView& x, const Dropped& mask);

// x where the mask, if there is one, keeps it: without a rounding, to be scaled with its product.
MatrixView kept(const MatrixView& x, const std::optional<Dropped>& mask);

}  // namespace lora_fused
