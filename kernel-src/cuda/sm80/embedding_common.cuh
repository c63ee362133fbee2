// What the kernels of an adapted embedding share; embedding_{forward,backward}.cuh hold them.
//
//   y[m] = c∘(e·W[i] + s·e·rows[m] Bᵀ)        rows[m] = A[:, i], i = ids[m]
//   drows = s·e·(c∘dy) B    dB = s·e·(c∘dy)ᵀ rows    dm = Σ dy∘(e·W[i] + s·e·rows Bᵀ) / norm
//   dA[:, v] = Σ drows over the tokens of v
//
// ids [M] in int64 or int32; W [V, H], y and dy [M, H] in bfloat16 or float16; A [R, V] and B [H, R] in those or
// float32; rows and drows [M, R], c (mag_norm_scale, or 1) and norm [H] in float32; e is the embedding's own scale.
//
// Bound by W[i], y and dy. Products run on tensor cores with float32 sums; what is not exact in the
// half type of a product enters as hi and lo of bfloat16 (16 bits, three products), so a float32 adapter
// keeps its precision. Every sum has one owner and a fixed order: deterministic. A lane owns 16
// neighbouring columns, in whose order fragments are loaded, so rows of W, y and dy move 16 bytes at
// a time: H is a multiple of 8.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include "../common/dtype.cuh"
#include "mma.cuh"

namespace lora_fused {
namespace embedding {

struct Array {
  const void* data;
  int dtype;
};

inline Array array_of(const torch::stable::Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_code(t.scalar_type(), name)};
}

struct Args {
  const void* ids;  // [m], int64 where wide, int32 else
  bool wide;
  const void* w;                       // [v, h]
  Array a, b;                          // [r, v], [h, r]
  const float *mag_norm_scale, *norm;  // [h], or null for LoRA
  Array scale;                         // one element, or null and `number`
  float scaling, number;
  int64_t m, v;
  int h, r;
};

__device__ __forceinline__ float load(const Array& from, int64_t i) { return load_as_float(from.data, from.dtype, i); }

__device__ __forceinline__ int64_t load_id(const Args& p, int64_t m) {
  return p.wide ? static_cast<const int64_t*>(p.ids)[m] : static_cast<const int32_t*>(p.ids)[m];
}

template <typename T>
__device__ __forceinline__ uint32_t pack_as(float x, float y) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return pack(x, y);
  const __half2 both = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <typename T>
__device__ __forceinline__ int dtype_of() {
  return std::is_same_v<T, __half> ? kHalf : kBFloat16;
}

// The embedding's own scale, as it multiplies a tensor of `dtype`.
__device__ __forceinline__ float own_scale(const Args& p, int dtype) {
  if (p.scale.data == nullptr) return p.number;
  const float e = load(p.scale, 0);
  if (dtype == kBFloat16) return __bfloat162float(__float2bfloat16(e));
  if (dtype == kHalf) return __half2float(__float2half(e));
  return e;
}

__device__ __forceinline__ uint4 load_row(const void* data, int64_t at, bool valid) {
  return valid ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at) : uint4{0, 0, 0, 0};
}

// c += a b with a in the half type T, b as hi and lo of bfloat16 {b0, b1 hi, b0, b1 lo}.
template <typename T>
__device__ __forceinline__ void multiply_bf16x3(float (&c)[4], const uint32_t (&a)[4], const uint4& b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    multiply<__nv_bfloat16>(c, a, b.z, b.w);
    multiply<__nv_bfloat16>(c, a, b.x, b.y);
  } else {
    uint32_t a_hi[4], a_lo[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 value = pair(a[q], __half());
      split(value.x, value.y, a_hi[q], a_lo[q]);
    }
    multiply<__nv_bfloat16>(c, a_lo, b.x, b.y);
    multiply<__nv_bfloat16>(c, a_hi, b.z, b.w);
    multiply<__nv_bfloat16>(c, a_hi, b.x, b.y);
  }
}

// {b0, b1 hi, b0, b1 lo} of four values.
__device__ __forceinline__ uint4 split_four(const float (&x)[4]) {
  uint4 b;
  split(x[0], x[1], b.x, b.z);
  split(x[2], x[3], b.y, b.w);
  return b;
}

constexpr int kRanks = 32;  // of one pass; more ranks, more passes
constexpr int kSteps = kRanks / 16, kRankTiles = kRanks / 8;
constexpr int kWarpCols = 64;  // 16 a lane

}  // namespace embedding
}  // namespace lora_fused
