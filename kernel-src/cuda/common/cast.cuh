// Many small conversions between float32, bfloat16 and float16 in one launch, some transposed, and sums
// of the products with hi and lo, in float32 or split again (bf16x3).
//
// Fused: the copies of all A's and B's of a batch to the dtype and layout of the products, and of all
// gradients back. Each tensor is cut into pieces; grid.y is the tensor, grid.x its pieces. A thread takes
// four neighbouring elements, or one row of a tensor that is transposed: of a rank's length, so that
// its lines stay in L1, while neighbouring threads write neighbouring elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "bf16x3.cuh"
#include "dtype.cuh"

namespace lora_fused::cast {

constexpr int kThreads = 256, kElements = 4;
constexpr int kTensors = 32;       // of one launch
constexpr int64_t kPieces = 1024;  // blocks a tensor; more work is looped over

struct Piece {
  const void* from;
  void* to;
  int64_t rows, cols;  // of `from`
  int64_t stride;      // from row to row of `to`, where not transposed
  int from_dtype, to_dtype;
  bool transposed, lo;
  bool vector;  // four neighbours of `from` go to four neighbours, both aligned
};

struct Pieces {
  Piece piece[kTensors];
};

// As load_as_float and store_float, which would read the piece's arguments into more registers.
__device__ __forceinline__ float load(const Piece& p, int64_t i) {
  if (p.from_dtype == kFloat) return static_cast<const float*>(p.from)[i];
  if (p.from_dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p.from)[i]);
  return __half2float(static_cast<const __half*>(p.from)[i]);
}

__device__ __forceinline__ void store(const Piece& p, int64_t i, float value) {
  if (p.to_dtype == kFloat)
    static_cast<float*>(p.to)[i] = value;
  else if (p.to_dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(p.to)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(p.to)[i] = __float2half(value);
}

// What is stored of a value: itself, or what its rounding to the target's dtype leaves out.
__device__ __forceinline__ float wanted(const Piece& p, float value) {
  if (!p.lo || p.to_dtype == kFloat) return p.lo ? 0.0f : value;
  return value -
         (p.to_dtype == kBFloat16 ? __bfloat162float(__float2bfloat16(value)) : __half2float(__float2half(value)));
}

// Where element i of `from`, counted row by row, goes in a target that is not transposed.
__device__ __forceinline__ int64_t target(const Piece& p, int64_t i) {
  return p.stride == p.cols ? i : i / p.cols * p.stride + i % p.cols;
}

template <typename Pair>
__device__ __forceinline__ float4 widened(uint2 bits) {
  const Pair low = *reinterpret_cast<const Pair*>(&bits.x), high = *reinterpret_cast<const Pair*>(&bits.y);
  return {static_cast<float>(low.x), static_cast<float>(low.y), static_cast<float>(high.x), static_cast<float>(high.y)};
}

// Four elements from `i`, a multiple of four, of tensors that start on 16 bytes.
__device__ __forceinline__ float4 load_four(const Piece& p, int64_t i) {
  if (p.from_dtype == kFloat) return static_cast<const float4*>(p.from)[i / 4];
  const uint2 bits = static_cast<const uint2*>(p.from)[i / 4];
  return p.from_dtype == kBFloat16 ? widened<__nv_bfloat162>(bits) : widened<__half2>(bits);
}

__device__ __forceinline__ void store_four(const Piece& p, int64_t i, float4 v) {
  if (p.to_dtype == kFloat) {
    static_cast<float4*>(p.to)[i / 4] = v;
  } else if (p.to_dtype == kBFloat16) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y), high = __floats2bfloat162_rn(v.z, v.w);
    static_cast<uint2*>(p.to)[i / 4] = {*reinterpret_cast<const uint32_t*>(&low),
                                        *reinterpret_cast<const uint32_t*>(&high)};
  } else {
    const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
    static_cast<uint2*>(p.to)[i / 4] = {*reinterpret_cast<const uint32_t*>(&low),
                                        *reinterpret_cast<const uint32_t*>(&high)};
  }
}

__device__ __forceinline__ void transpose_row(const Piece& p, int64_t row) {
  int64_t col = 0;
  if (p.vector && p.cols % kElements == 0)
    for (; col < p.cols; col += kElements) {
      const float4 four = load_four(p, row * p.cols + col);
      store(p, col * p.rows + row, four.x);
      store(p, (col + 1) * p.rows + row, four.y);
      store(p, (col + 2) * p.rows + row, four.z);
      store(p, (col + 3) * p.rows + row, four.w);
    }
  for (; col < p.cols; ++col) store(p, col * p.rows + row, load(p, row * p.cols + col));
}

static __global__ void __launch_bounds__(kThreads) cast_fwd_kernel(const __grid_constant__ Pieces pieces) {
  const Piece& p = pieces.piece[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p.transposed) {
    for (int64_t row = first; row < p.rows; row += step) transpose_row(p, row);
    return;
  }
  const int64_t count = p.rows * p.cols;
  for (int64_t i = first * kElements; i < count; i += step * kElements) {
    if (p.vector && i + kElements <= count) {
      const float4 v = load_four(p, i);
      store_four(p, target(p, i), {wanted(p, v.x), wanted(p, v.y), wanted(p, v.z), wanted(p, v.w)});
      continue;
    }
    for (int64_t j = i; j < min(i + kElements, count); ++j) store(p, target(p, j), wanted(p, load(p, j)));
  }
}

// One `HiLoSum`; strides from row to row.
struct Sum {
  const float *hi, *lo;
  void* out;
  float scaling;
  int64_t rows, cols, from_stride, to_stride;
  int64_t split_ranks, split_stride;  // `SplitLayout`, or zeros
};

constexpr int kSums = 16;  // of one launch

struct Sums {
  Sum sum[kSums];
};

static __global__ void __launch_bounds__(kThreads) hi_lo_sum_fwd_kernel(const __grid_constant__ Sums sums) {
  const Sum& s = sums.sum[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, count = s.rows * s.cols;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / s.cols, col = i - row * s.cols;
    const int64_t from = row * s.from_stride + col, to = row * s.to_stride;
    const float v = s.scaling * (s.hi[from] + s.lo[from]);
    if (s.split_stride > 0)
      store_split(static_cast<__nv_bfloat16*>(s.out) + to, col, s.split_ranks, s.split_stride, v);
    else
      static_cast<float*>(s.out)[to + col] = v;
  }
}

}  // namespace lora_fused::cast
