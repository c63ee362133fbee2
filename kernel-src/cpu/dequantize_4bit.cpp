// Four-bit weights to floating point on the CPU, see common/four_bit.h.
//
// A block has 16 possible values: they are computed once and looked up.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/dtypes.h"
#include "../common/kernels.h"

namespace {

using lora_fused::FourBit;

constexpr float kNf4[16] = LORA_FUSED_NF4_CODE, kFp4[16] = LORA_FUSED_FP4_CODE;

float absmax_of(const FourBit& p, int64_t block) {
  if (p.absmax) return p.absmax[block];
  // Rounded in between: volatile keeps the compiler from fusing product and sum.
  const volatile float product = p.nested_code[p.absmax_codes[block]] * p.nested_absmax[block >> p.nested_shift];
  return product + *p.offset;
}

// Elements [begin, end) of the flat weight, all of one block.
template <typename T>
void dequantize_block(const FourBit& p, int64_t begin, int64_t end) {
  const float absmax = absmax_of(p, begin >> p.shift), *code = p.fp4 ? kFp4 : kNf4;
  T value[16];
  for (int q = 0; q < 16; ++q) value[q] = static_cast<T>(code[q] * absmax);
  T* out = static_cast<T*>(p.out) + (begin - p.first);
  for (int64_t i = begin; i < end; i += 2) {
    const uint8_t byte = p.packed[i / 2];
    *out++ = value[byte >> 4];
    if (i + 1 < end) *out++ = value[byte & 15];
  }
}

template <typename T>
void run(const FourBit& p) {
  const int64_t first = p.first >> p.shift, last = p.first + p.count;
  const int64_t grain = std::max<int64_t>(1, int64_t{1 << 15} >> p.shift);
  torch::stable::parallel_for(first, lora_fused::blocks_of(last, p.shift), grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      dequantize_block<T>(p, std::max(p.first, block << p.shift), std::min(last, (block + 1) << p.shift));
  });
}

}  // namespace

void lora_fused::dequantize_4bit_cpu(const FourBit& weight, torch::headeronly::ScalarType dtype) {
  LORA_FUSED_UP_TO_FLOAT32(dtype, "dequantize_4bit", [&] { run<scalar_t>(weight); });
}
