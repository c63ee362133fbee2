// Float32 values as hi and lo of bfloat16 on the CPU: what a rounding leaves out, and sums of products stored so.
//
// A twin of cast.cu's for the tests: layers give float32 adapters to float32 products here.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include "../common/kernels.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;

float element(const lora_fused::MatrixView& m, int64_t row, int64_t col) {
  return static_cast<const float*>(m.const_data_ptr())[row * m.stride(0) + col * m.stride(1)];
}

template <typename T>
void set(const lora_fused::MatrixView& m, int64_t row, int64_t col, float value) {
  static_cast<T*>(m.mutable_data_ptr())[row * m.stride(0) + col * m.stride(1)] = static_cast<T>(value);
}

float lo_of(float value) { return value - static_cast<float>(static_cast<BFloat16>(value)); }

}  // namespace

void lora_fused::lo_cpu(const Cast& cast) {
  const bool is_bfloat16 = cast.from.scalar_type() != ScalarType::Float;
  for (int64_t i = 0; i < cast.from.size(0); ++i)
    for (int64_t j = 0; j < cast.from.size(1); ++j)
      set<BFloat16>(cast.to, i, j, is_bfloat16 ? 0.0f : lo_of(element(cast.from, i, j)));
}

void lora_fused::hi_lo_sums_cpu(const std::vector<HiLoSum>& sums) {
  for (const HiLoSum& sum : sums)
    for (int64_t i = 0; i < sum.hi.size(0); ++i)
      for (int64_t j = 0; j < sum.hi.size(1); ++j) {
        const float value = static_cast<float>(sum.scaling) * (element(sum.hi, i, j) + element(sum.lo, i, j));
        if (!sum.split) {
          set<float>(sum.out, i, j, value);
          continue;
        }
        const int64_t stride = sum.split->stride, to = j + 2 * stride * (j / sum.split->ranks);
        set<BFloat16>(sum.out, i, to, value);
        set<BFloat16>(sum.out, i, to + stride, value);
        set<BFloat16>(sum.out, i, to + 2 * stride, lo_of(value));
      }
}
