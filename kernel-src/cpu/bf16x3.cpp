// Float32 values as two parts of bfloat16 on the CPU: what a rounding leaves out, and sums of products as parts.
//
// A twin of cast.cu's for the tests: layers give float32 adapters to float32 products here.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include "../common/kernels.h"

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;

float element(const lora_fused::View& m, int64_t row, int64_t col) {
  return static_cast<const float*>(m.const_data_ptr())[row * m.stride(0) + col * m.stride(1)];
}

template <typename T>
void set(const lora_fused::View& m, int64_t row, int64_t col, float value) {
  static_cast<T*>(m.mutable_data_ptr())[row * m.stride(0) + col * m.stride(1)] = static_cast<T>(value);
}

float rest_of(float value) { return value - static_cast<float>(static_cast<BFloat16>(value)); }

}  // namespace

void lora_fused::rest_cpu(const Cast& cast) {
  const bool exact = cast.from.scalar_type() != ScalarType::Float;  // in bfloat16 already
  for (int64_t i = 0; i < cast.from.size(0); ++i)
    for (int64_t j = 0; j < cast.from.size(1); ++j)
      set<BFloat16>(cast.to, i, j, exact ? 0.0f : rest_of(element(cast.from, i, j)));
}

void lora_fused::part_sums_cpu(const std::vector<PartSum>& sums) {
  for (const PartSum& sum : sums)
    for (int64_t i = 0; i < sum.first.size(0); ++i)
      for (int64_t j = 0; j < sum.first.size(1); ++j) {
        const float value = static_cast<float>(sum.scaling) * (element(sum.first, i, j) + element(sum.second, i, j));
        if (!sum.parts) {
          set<float>(sum.out, i, j, value);
          continue;
        }
        const int64_t apart = sum.parts->apart, to = j + 2 * apart * (j / sum.parts->ranks);
        set<BFloat16>(sum.out, i, to, value);
        set<BFloat16>(sum.out, i, to + apart, value);
        set<BFloat16>(sum.out, i, to + 2 * apart, rest_of(value));
      }
}
