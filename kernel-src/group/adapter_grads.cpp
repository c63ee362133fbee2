// dA and dB, see adapter_grads.h.
#include "adapter_grads.h"

#include "products.h"

namespace lora_fused {

Tensor AdapterGrads::product(const MatrixView& t, const MatrixView& input, ScalarType dtype, bool transposed,
                             const std::optional<Dropped>& mask, double scaling) {
  const int64_t rank = t.size(1), cols = input.size(1);
  const std::vector<int64_t> sizes{transposed ? cols : rank, transposed ? rank : cols};
  const Tensor wanted = empty(like_.base(), sizes, dtype);
  const bool direct = dtype == like_.scalar_type() || (dtype == ScalarType::Float && supports_float_output(like_));
  if (direct && batch_.add({t, input, wanted, transposed, mask, std::nullopt, scaling})) return wanted;
  const Tensor own = direct ? wanted : empty(like_.base(), sizes, like_.scalar_type());
  const MatrixView from = mask ? dropped(input, *mask) : input;
  transposed ? multiply(own, from.transposed(), t, scaling, /*add=*/false)
             : multiply(own, t.transposed(), from, scaling, /*add=*/false);
  if (!direct) casts_.push_back({own, wanted});
  return wanted;
}

Tensor AdapterGrads::product_bf16x3(const MatrixView& both, const MatrixView& input, bool transposed,
                                    const std::optional<Dropped>& mask) {
  const int64_t rank = both.size(1) / 2, cols = input.size(1);
  const auto shaped = [&](int64_t ranks) {
    return empty(like_.base(), {transposed ? cols : ranks, transposed ? ranks : cols}, ScalarType::Float);
  };
  const Tensor out = shaped(rank);
  const MatrixView hi = both.columns(0, rank), lo = both.columns(rank, rank);
  if (batch_.add({hi, input, out, transposed, mask, lo})) return out;
  const MatrixView wide = shaped(2 * rank), from = kept(input, mask);
  if (transposed) {
    multiply(wide, from.transposed(), both, 1.0, /*add=*/false);
    sums_.push_back({wide.columns(0, rank), wide.columns(rank, rank), out, scale_of(mask)});
  } else {
    multiply(wide, both.transposed(), from, 1.0, /*add=*/false);
    sums_.push_back({wide.rows(0, rank), wide.rows(rank, rank), out, scale_of(mask)});
  }
  return out;
}

Tensor AdapterGrads::converted(const MatrixView& sum, ScalarType dtype) {
  if (dtype == ScalarType::Float) return sum.tensor();
  const Tensor wanted = empty(like_.base(), {sum.size(0), sum.size(1)}, dtype);
  casts_.push_back({sum, wanted});
  return wanted;
}

void AdapterGrads::run(SideStream* side) {
  batch_.run(side);
  sum_hi_lo(sums_);
  cast_all(casts_);
  sums_.clear();
  casts_.clear();
}

}  // namespace lora_fused
