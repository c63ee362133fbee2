// The operands of an op: projections of one input, each a member of a group.
//
// What a reader of group/ meets in this order: members.h (operands), adapters.h (A and B as the products read them),
// forward.h, backward.h, adapter_grads.h; beside them products.h (sums of matrix products), skinny.h (products with a rank),
// dora_norms.h and passes.h (everything else that runs on a device).
#pragma once

#include <optional>
#include <vector>

#include "../common/kernels.h"
#include "../common/tensors.h"

namespace lora_fused {

// What a gradient is wanted of, by member: bits of the ops' `needs`.
enum Need : int64_t { kNeedA = 1, kNeedB = 2, kNeedBias = 4, kNeedMagnitude = 8 };

// What the ops are given of one projection, in this order: W, b + s·b_B, A, B, the magnitude in a forward that makes
// the norm or the norm in a backward, and the mag_norm_scale. Any but the weight may be none.
enum Operand : size_t { kWeight, kBias, kLoraA, kLoraB, kMagnitudeOrNorm, kMagNormScale, kOperands };

using Numbers = std::optional<std::vector<double>>;
using Integers = std::optional<std::vector<int64_t>>;

// What every op takes. One list for the tensors of all projections, and none for numbers that are not there: each list
// and each element costs the dispatcher's boxing.
struct GroupArgs {
  // kOperands a projection, then the scales of quantized weights.
  Optionals operands;
  const std::vector<double>& scalings;  // one a projection
  const std::optional<Tensor>& seeds;
  const Numbers& dropouts;  // one a projection
  // Of weights in four bits: a PackedWeight a projection; its kFirstScale counts the scales.
  const Integers& quantized;
  // Adapters of float32 beside x in bfloat16, of DoRA without dropout: multiplied as hi and lo (adapters.h).
  bool bf16x3;

  size_t count() const { return scalings.size(); }
  const std::optional<Tensor>& operand(size_t i, Operand which) const { return operands[kOperands * i + which]; }
  const Tensor& weight(size_t i) const { return *operand(i, kWeight); }
  const std::optional<Tensor>* scales() const { return operands.data() + kOperands * count(); }

  // An error where something is missing, or `quantized` says what this library does not know, which would be taken for
  // something else.
  void check() const;
};

// A weight of four bits a value, of the lists above: `numbers` are its own of `quantized`.
class FourBitWeight {
 public:
  FourBitWeight(const Tensor& packed, const std::optional<Tensor>* scales, const int64_t* numbers)
      : packed_(packed), scales_(scales + numbers[PackedWeight::kFirstScale]), numbers_(numbers) {}

  int64_t rows() const { return numbers_[PackedWeight::kRows]; }
  int64_t cols() const { return numbers_[PackedWeight::kCols]; }
  ScalarType dtype() const {
    static_assert(kQuantizedDtypes == 3, "FourBitWeight: a dtype for each");
    const int64_t dtype = numbers_[PackedWeight::kDtype];
    return dtype == kFromBFloat16 ? ScalarType::BFloat16 : dtype == kFromFloat16 ? ScalarType::Half : ScalarType::Float;
  }
  // From element `first` of the flat weight on, as many as `out` has, in its dtype.
  void dequantize(int64_t first, const Tensor& out) const;

 private:
  const Tensor& packed_;
  const std::optional<Tensor>* scales_;
  const int64_t* numbers_;
};

// The factor of the scaling s that the products which read t have; t has the other one. In float16 s·D(x) Aᵀ may be out
// of range where D(x) Aᵀ, which PEFT multiplies by B first, is not. So there t has a factor of at most 1, and this is a
// power of two; it is 1 elsewhere. Python's `split_scaling` has the same rule.
double expand_scaling_of(double scaling, ScalarType dtype);

// Projections [first, first + count) of the lists, which share an input.
class Members {
 public:
  Members(const GroupArgs& args, size_t first, size_t count) : args_(args), first_(first), count_(count) {}

  size_t count() const { return count_; }
  size_t index(size_t i) const { return first_ + i; }
  // [N, K] in `dtype`; of a quantized weight a copy that lives as long as its caller keeps it.
  Tensor weight(size_t i, ScalarType dtype) const;
  // None of a weight in floating point.
  std::optional<FourBitWeight> packed(size_t i) const;
  int64_t outputs(size_t i) const {
    return is_packed(i) ? quantized(i)[PackedWeight::kRows] : args_.weight(first_ + i).size(0);
  }
  const std::optional<Tensor>& bias(size_t i) const { return args_.operand(first_ + i, kBias); }
  const std::optional<Tensor>& a(size_t i) const { return args_.operand(first_ + i, kLoraA); }
  const std::optional<Tensor>& b(size_t i) const { return args_.operand(first_ + i, kLoraB); }
  const std::optional<Tensor>& norm(size_t i) const { return args_.operand(first_ + i, kMagnitudeOrNorm); }
  const std::optional<Tensor>& mag_norm_scale(size_t i) const { return args_.operand(first_ + i, kMagNormScale); }
  double scaling(size_t i) const { return args_.scalings[first_ + i]; }
  // The two factors of it where x is in `dtype`: t's own, and that of the products which read t.
  double shrink_scaling(size_t i, ScalarType dtype) const { return scaling(i) / expand_scaling(i, dtype); }
  double expand_scaling(size_t i, ScalarType dtype) const { return expand_scaling_of(scaling(i), dtype); }
  bool masked(size_t i) const { return args_.dropouts && (*args_.dropouts)[first_ + i] != 0.0; }
  int64_t rank(size_t i) const { return a(i) ? a(i)->size(0) : 0; }
  std::optional<Dropped> mask(size_t i) const;

  // DoRA's scale and what it leaves alone: with a mask the bias is added outside.
  ScaleAroundBias scale_around_bias(size_t i) const { return {mag_norm_scale(i), masked(i) ? std::nullopt : bias(i)}; }
  // DoRA without dropout: the output is one product, scaled.
  bool scales_output(size_t i) const { return mag_norm_scale(i) && !masked(i); }
  bool any_masked() const;
  bool bf16x3() const { return args_.bf16x3; }

  // What members with an adapter have in common, `value_of` each, if all have the same.
  template <typename ValueOf>
  auto common(ValueOf value_of) const -> std::optional<decltype(value_of(size_t{}))> {
    std::optional<decltype(value_of(size_t{}))> shared;
    for (size_t i = 0; i < count_; ++i) {
      if (!a(i)) continue;
      if (shared && *shared != value_of(i)) return std::nullopt;
      shared = value_of(i);
    }
    return shared;
  }
  std::optional<double> common_shrink_scaling(ScalarType dtype) const {
    return common([&](size_t i) { return shrink_scaling(i, dtype); });
  }

 private:
  const int64_t* quantized(size_t i) const { return args_.quantized->data() + PackedWeight::kFields * (first_ + i); }
  bool is_packed(size_t i) const { return args_.quantized && quantized(i)[PackedWeight::kFormat] != kFloating; }

  const GroupArgs& args_;
  size_t first_, count_;
};

}  // namespace lora_fused
