// The backward of projections that share an input. ops/lora_group.cpp has the formulas.
#pragma once

#include <vector>

#include "adapter_grads.h"
#include "adapters.h"
#include "members.h"
#include "products.h"

namespace lora_fused {

// Whether x is read for a gradient of one of the first `count` members.
bool needs_any_a(const std::vector<int64_t>& needs, size_t count);

// Each member's dy and what is wanted of it besides products: times DoRA's scale, and its sums over tokens. Plain LoRA
// needs no pass over it.
struct OutputGrads {
  // `unscaled`: of Outputs. `own_dys`: whether they may be written over.
  // `dys` [..., N]; `unscaled`: of Outputs. `own_dys`: whether they may be written over.
  OutputGrads(const Members& members, const Optionals& dys, const Tensors& unscaled, const std::vector<int64_t>& needs,
              bool own_dys);

  // The passes, where nobody has taken them.
  void run();

  // By member:
  std::vector<MaybeMatrixView> dys;                        // [M, N], none where an output was not used
  std::vector<MaybeMatrixView> dunscaled;                  // the gradient of the sum that the LoRA term is in
  Optionals dmagnitudes, dbiases;                          // [N]
  std::vector<std::optional<ScaleOutputBackward>> passes;  // which fill these
};

// The backward of `project`, in the steps that a gated MLP needs apart: dt, dB and the sums over tokens are made by the
// constructor, dx by `input`, what else is wanted by `parameters`.
class Backward {
 public:
  struct Given {
    const std::vector<int64_t>& needs;
    bool need_dx;
    const Tensor& t;  // of Outputs
  };

  // What it reads of the adapters; conversions go to `casts`, which the caller runs.
  static Adapters adapters(const MatrixView& x, const Members& members, std::vector<Cast>& casts, bool need_dx);

  // `x` gives dtype and shape alone: it need not be filled before `parameters`. Runs what is left of the outputs' passes.
  Backward(const Members& members, const MatrixView& x, Adapters adapters, OutputGrads outputs, const Given& given);

  // Whether `input` makes nothing that `parameters` reads: a product of the library's or of ours, beside which these
  // may run.
  bool makes_dx_alone() const { return need_dx_ && waiting_.empty(); }

  // dx [M, K] of all members.
  void input(const MatrixView& dx, SideStream* side = nullptr) const;

  // Appends the gradients that are wanted: of each member in turn A, B, bias, magnitude. A and B in their own dtype,
  // the sums over tokens in float32 (float64 for float64).
  void parameters(const MatrixView& x, Tensors& grads, AdapterGrads& products) const;

  // Both, with dx [..., K] like `x` in front where it is needed, and runs `products`: beside dx's launch where that is
  // wanted and can be.
  void gradients(const Tensor& x, const MatrixView& rows, bool beside, AdapterGrads& products, Tensors& grads) const;

 private:
  bool needs(size_t i, Need need) const { return dys_[i] && (needs_[members_.index(i)] & need) != 0; }
  void shrink_dy();
  void shrink_dy_bf16x3();
  std::vector<Term> dropped_terms(size_t i) const;
  void add_dropped(const MatrixView& dx, const std::vector<size_t>& which) const;
  Tensor grad_a(size_t i, const MatrixView& x, AdapterGrads& products, MaybeTensor& all) const;
  Tensor grad_b(size_t i, AdapterGrads& products) const;

  const Members& members_;
  const std::vector<int64_t>& needs_;
  bool need_dx_;
  MatrixView x_, t_;
  bool at_once_;  // dx and the dt that it reads are to be one launch
  std::vector<MaybeMatrixView> dys_, dunscaled_;
  Optionals dmagnitudes_, dbiases_, dbs_;  // [N], [N], and where made with dt [N, R]
  Adapters adapters_;
  MaybeMatrixView dt_;
  std::vector<Shrink> waiting_;  // what of dt `input` makes
};

}  // namespace lora_fused
