// The operands of an op, see members.h.
#include "members.h"

#include <cmath>

#include "passes.h"

namespace lora_fused {

double expand_scaling_of(double scaling, ScalarType dtype) {
  if (dtype != ScalarType::Half || !(std::abs(scaling) > 1.0)) return 1.0;
  int exponent = 0;  // 2^exponent is above |s|, and twice it where s is a power of two itself
  const bool is_power = std::frexp(std::abs(scaling), &exponent) == 0.5;
  return std::ldexp(1.0, is_power ? exponent - 1 : exponent);
}

void GroupArgs::check() const {
  using P = PackedWeight;
  STD_TORCH_CHECK(operands.size() >= kOperands * count(), "operands: ", operands.size(), " for ", count(),
                  " scalings, expected ", size_t{kOperands}, " each");
  for (size_t i = 0; i < count(); ++i) STD_TORCH_CHECK(operand(i, kWeight), "weight ", i, ": none, expected a tensor");
  STD_TORCH_CHECK(!dropouts || dropouts->size() == count(), "dropouts: expected ", count());
  if (!quantized) return;
  const size_t scales = operands.size() - kOperands * count();
  STD_TORCH_CHECK(quantized->size() == P::kFields * count(), "quantized: ", quantized->size(), " numbers for ", count(),
                  " weights, expected ", int64_t{P::kFields}, " each");
  for (size_t at = 0; at < quantized->size(); at += P::kFields) {
    const int64_t* const q = quantized->data() + at;
    STD_TORCH_CHECK(q[P::kFormat] >= 0 && q[P::kFormat] < kFormats, "weight ", at / P::kFields, ": format ",
                    q[P::kFormat], " is unknown, expected one of ", names_of("formats"));
    STD_TORCH_CHECK(q[P::kDtype] >= 0 && q[P::kDtype] < kQuantizedDtypes, "weight ", at / P::kFields, ": dtype ",
                    q[P::kDtype], " is unknown, expected one of ", names_of("dtypes"));
    const size_t last = q[P::kFirstScale] + (q[P::kFormat] == kFloating ? 0 : q[P::kNestedBlocksize] > 0 ? 4 : 1);
    STD_TORCH_CHECK(q[P::kFirstScale] >= 0 && last <= scales, "weight ", at / P::kFields, ": ", scales,
                    " scales, expected at least ", last);
  }
}

void FourBitWeight::dequantize(int64_t first, const Tensor& out) const {
  using P = PackedWeight;
  static_assert(kFormats == 3, "FourBitWeight: NF4 or FP4");
  const int64_t *q = numbers_, blocksize = q[P::kBlocksize], nested_blocksize = q[P::kNestedBlocksize];
  const bool fp4 = q[P::kFormat] == kFp4;
  const auto nested = [&](int which) { return nested_blocksize > 0 ? scales_[which] : std::nullopt; };
  dequantize_4bit(
      four_bit_of(packed_, *scales_[0], nested(1), nested(2), nested(3), blocksize, nested_blocksize, fp4, first, out),
      out);
}

std::optional<Dropped> Members::mask(size_t i) const {
  if (!masked(i)) return std::nullopt;
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(args_.seeds->get(), 1, &one, &one, static_cast<int64_t>(first_ + i), &handle));
  return Dropped{Tensor(handle), (*args_.dropouts)[first_ + i]};
}

Tensor Members::weight(size_t i, ScalarType dtype) const {
  const Tensor& stored = args_.weight(first_ + i);
  const std::optional<FourBitWeight> packed = this->packed(i);
  if (!packed) return stored;
  const Tensor weight = empty(stored, {packed->rows(), packed->cols()}, dtype);
  packed->dequantize(0, weight);
  return weight;
}

std::optional<FourBitWeight> Members::packed(size_t i) const {
  if (!is_packed(i)) return std::nullopt;
  return FourBitWeight(args_.weight(first_ + i), args_.scales(), quantized(i));
}

bool Members::any_masked() const {
  for (size_t i = 0; i < count_; ++i)
    if (masked(i)) return true;
  return false;
}

}  // namespace lora_fused
