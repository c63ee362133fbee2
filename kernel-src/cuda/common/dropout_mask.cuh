// The dropout mask of common/dropout.h in registers, for the products that draw it where they load x.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../../common/dropout.h"
#include "../../common/kernels.h"

namespace lora_fused {

// A number of 16 bits keeps its element where, in the upper half of a word, it is at least `threshold`. What
// is kept is scaled with the product, see `scale_of`: nothing is, at p = 1.
struct Mask {
  const int64_t* seed = nullptr;  // null for no mask
  uint32_t threshold = 0;

  __device__ __forceinline__ bool keeps_low(uint32_t word) const { return (word << 16) >= threshold; }
  __device__ __forceinline__ bool keeps_high(uint32_t word) const { return word >= threshold; }
  __device__ __forceinline__ uint64_t key() const { return seed == nullptr ? 0 : static_cast<uint64_t>(*seed); }
};

// Eight neighbouring elements of 16 bits, zeros where the mask drops them: two at a time, as bits.
__device__ __forceinline__ uint4 masked(uint4 x, uint64_t key, const Mask& mask, int64_t row, uint32_t column_block) {
  const Words words = philox(key, row, column_block);
  uint32_t pairs[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] &=
        (mask.keeps_low(words.word[i]) ? 0x0000ffffu : 0u) | (mask.keeps_high(words.word[i]) ? 0xffff0000u : 0u);
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

inline Mask mask_of(const std::optional<Dropped>& dropped) {
  if (!dropped) return {};
  return {static_cast<const int64_t*>(dropped->seed.const_data_ptr()), std::min(Keep(dropped->p).threshold, 0xffffu)
                                                                           << 16};
}

}  // namespace lora_fused
