// dA and dB: the products of dt with x and of t with dy.
#pragma once

#include <optional>
#include <vector>

#include "passes.h"
#include "skinny.h"

namespace lora_fused {

// The products tᵀ D(input) of groups' adapters, those that own kernels make in one launch. Results are there after
// `run`. `like` gives dtype and device. `beside`: `run` gets a product to run beside.
class AdapterGrads {
 public:
  AdapterGrads(const MatrixView& like, bool beside) : like_(like), batch_(beside) {}

  // scaling·tᵀ D(input) or, transposed, its transpose, in `dtype`: with all others of its kind, by the library into
  // what is wanted, or by a conversion of its product in like's dtype.
  Tensor product(const MatrixView& t, const MatrixView& input, ScalarType dtype, bool transposed,
                 const std::optional<Dropped>& mask, double scaling = 1.0);

  // (hi + lo)ᵀ D(input) or, transposed, its transpose, in float32; hi and lo are next to each other.
  Tensor product_bf16x3(const MatrixView& both, const MatrixView& input, bool transposed,
                        const std::optional<Dropped>& mask);

  // A float32 result of product_bf16x3, or some rows of it, in `dtype`.
  Tensor converted(const MatrixView& sum, ScalarType dtype);

  void run(SideStream* side = nullptr);

 private:
  MatrixView like_;
  SkinnyBatch<AdapterGrad> batch_;
  std::vector<HiLoSum> sums_;
  std::vector<Cast> casts_;
};

}  // namespace lora_fused
