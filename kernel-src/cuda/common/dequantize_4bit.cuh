// Four-bit weights to floating point on CUDA, see common/four_bit.h.
//
// Fused: nested absmax and values in one launch. Bound by memory: half a byte read and an element
// written per value. A thread takes 32 values in groups of eight, four of float32: four or two bytes
// in, 16 out, neighbouring threads side by side, all reads of a thread in flight at once: both codes stand in
// shared memory, so that no read waits for another. Operands that are not aligned, and the last values of a
// weight, go byte by byte.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../../common/four_bit.h"

namespace lora_fused::dequantize_4bit {

constexpr int kThreads = 256, kPerThread = 32, kPerBlock = kThreads * kPerThread;
// Values of a group: 16 bytes out, so that a warp's store is contiguous.
template <typename T>
constexpr int kGroup = 16 / sizeof(T);

__device__ const float kCodes[2][16] = {LORA_FUSED_NF4_CODE, LORA_FUSED_FP4_CODE};

__device__ __forceinline__ void convert(float* out, float value) { *out = value; }
__device__ __forceinline__ void convert(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void convert(__half* out, float value) { *out = __float2half_rn(value); }

// What absmax of a block is made of, as read: two loads that do not wait for each other.
template <bool kNested>
struct Absmax {
  float value;    // nested: of its own block
  uint32_t code;  // nested: its place in nested_code

  Absmax() = default;
  __device__ __forceinline__ Absmax(const FourBit& p, int64_t block) {
    value = __ldg(kNested ? p.nested_absmax + (block >> p.nested_shift) : p.absmax + block);
    if constexpr (kNested) code = __ldg(p.absmax_codes + block);
  }
  __device__ __forceinline__ float get(const float* nested_code, float offset) const {
    if constexpr (!kNested) return value;
    return __fadd_rn(__fmul_rn(nested_code[code], value), offset);
  }
};

template <typename T>
struct alignas(16) Group {
  T value[kGroup<T>];
};

template <typename T, bool kNested, bool kVector>
__global__ void __launch_bounds__(kThreads) dequantize_4bit_fwd_kernel(const __grid_constant__ FourBit p) {
  constexpr int kValues = kGroup<T>, kUnroll = kPerThread / kValues;
  using Bytes = std::conditional_t<kValues == 8, uint32_t, uint16_t>;  // of a group
  __shared__ float code[16], nested_code[kNested ? kThreads : 1];
  if (threadIdx.x < 16) code[threadIdx.x] = kCodes[p.fp4][threadIdx.x];
  float offset = 0.0f;
  if constexpr (kNested) {
    nested_code[threadIdx.x] = __ldg(p.nested_code + threadIdx.x);
    offset = __ldg(p.offset);
  }
  const int64_t start = int64_t{blockIdx.x} * kPerBlock, flat = p.first + start;
  const int left = static_cast<int>(min(p.count - start, int64_t{kPerBlock}));
  const uint8_t* const packed = p.packed + flat / 2;
  T* const out = static_cast<T*>(p.out) + start;
  uint32_t bytes[kUnroll];
  Absmax<kNested> absmax[kUnroll];
  if constexpr (kVector) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // Without a branch, so that no read waits for another: what is past the end reads the start.
      const int at = (u * kThreads + threadIdx.x) * kValues;
      const int64_t from = at + kValues <= left ? flat + at : p.first;
      bytes[u] = __ldg(reinterpret_cast<const Bytes*>(p.packed + from / 2));
      absmax[u] = Absmax<kNested>(p, from >> p.shift);
    }
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int at = (u * kThreads + threadIdx.x) * kValues;
    if (at >= left) return;
    if (kVector && at + kValues <= left) {
      Group<T> group;
      const float scale = absmax[u].get(nested_code, offset);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {  // the high half of each byte comes first
        const uint32_t q = (bytes[u] >> (4 * (i ^ 1))) & 15;
        convert(&group.value[i], __fmul_rn(code[q], scale));
      }
      *reinterpret_cast<Group<T>*>(out + at) = group;
      continue;
    }
#pragma unroll 1
    for (int i = at; i < min(at + kValues, left); ++i) {
      const uint32_t byte = packed[i / 2], q = i % 2 ? byte & 15 : byte >> 4;
      const float scale = Absmax<kNested>(p, (flat + i) >> p.shift).get(nested_code, offset);
      convert(out + i, __fmul_rn(code[q], scale));
    }
  }
}

}  // namespace lora_fused::dequantize_4bit
