// A value of float32 as bfloat16, three times (`Parts`): rounded, the same again, and what the rounding leaves out.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace lora_fused {

// To the columns of a row that `row` begins; column j of the value's matrix.
__device__ __forceinline__ void store_parts(__nv_bfloat16* row, int64_t j, int64_t ranks, int64_t apart, float value) {
  __nv_bfloat16* const to = row + j + 2 * apart * (j / ranks);
  const __nv_bfloat16 high = __float2bfloat16(value);
  to[0] = high;
  to[apart] = high;
  to[2 * apart] = __float2bfloat16(value - __bfloat162float(high));
}

}  // namespace lora_fused
