// A float32 value stored as three of bfloat16 (`SplitLayout`): hi, hi again, and lo, what the rounding leaves out.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace lora_fused {

// To the columns of a row that `row` begins; column j of the value's matrix.
__device__ __forceinline__ void store_split(__nv_bfloat16* row, int64_t j, int64_t ranks, int64_t stride, float value) {
  __nv_bfloat16* const to = row + j + 2 * stride * (j / ranks);
  const __nv_bfloat16 hi = __float2bfloat16(value);
  to[0] = hi;
  to[stride] = hi;
  to[2 * stride] = __float2bfloat16(value - __bfloat162float(hi));
}

}  // namespace lora_fused
