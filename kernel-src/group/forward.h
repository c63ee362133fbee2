// The forward of projections that share an input. ops/lora_group.cpp has the formulas.
#pragma once

#include "adapters.h"
#include "dora_norms.h"
#include "members.h"

namespace lora_fused {

struct Outputs {
  Tensors ys;        // shaped as asked; the unscaled output where `with_scaled` was false and the member scales its own
  Tensors unscaled;  // [M, N] before DoRA's scale, of every member that has one
  Tensor t;          // [M, Σ R], three times as wide where bf16x3
};

// What `project` and `shrink` read of the adapters, those without B; conversions go to `casts`, which the caller runs.
Adapters forward_adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_b = true);

// For x [M, K]; ys are shaped as `like` is but for the last dimension. Without `with_scaled` a member that scales its
// output is left unscaled: another pass does it.
Outputs project(const MatrixView& x, const Tensor& like, const Members& members, const Adapters& adapters,
                const Norms& norms, bool with_scaled);

// The unscaled output of member i alone, which has DoRA and dropout, again; t of Outputs.
Tensor project_dropped(const MatrixView& x, const Members& members, size_t i, const Tensor& t);

// Outputs::t alone, of members without DoRA.
Tensor shrink(const MatrixView& x, const Members& members, const Adapters& adapters);

}  // namespace lora_fused
