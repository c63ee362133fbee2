// What the memory-bound passes share: eight neighbouring columns of a row as one access, 16 bytes of
// half precision where every row starts on such a boundary, and conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "../../common/matrix_view.h"

namespace lora_fused {

constexpr int kColumns = 8;

// i / n of 0 <= i and 0 < n; in 32 bits where both have no more, since a division of 64 takes some hundred instructions.
__device__ __forceinline__ int64_t quotient(int64_t i, int64_t n) {
  return (i | n) <= UINT32_MAX ? static_cast<uint32_t>(i) / static_cast<uint32_t>(n) : i / n;
}

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <typename T, typename Wide>
__device__ __forceinline__ T narrow(Wide v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(v);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(v);
  else
    return v;
}

template <typename T>
struct alignas(sizeof(T) * kColumns > 16 ? 16 : sizeof(T) * kColumns) Columns {
  T value[kColumns];
};

// Whole, 16 bytes an access. Not an assignment: the compiler takes those apart at times, into four times as many
// stores, each of a part of a sector.
template <typename T>
__device__ __forceinline__ void store(T* to, const Columns<T>& from) {
  static_assert(sizeof(from) % 16 == 0);
#pragma unroll
  for (size_t i = 0; i < sizeof(from) / 16; ++i) {
    const uint4 x = reinterpret_cast<const uint4*>(&from)[i];
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<uint4*>(to) + i), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
  }
}

template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
};

template <typename T>
__device__ __forceinline__ void load(Columns<T>& to, const Matrix<T>& m, int64_t row, int64_t col, int64_t count,
                                     bool aligned) {
  const T* from = m.data + row * m.stride + col;
  if (aligned) {
    to = *reinterpret_cast<const Columns<T>*>(from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) to.value[j] = j < count ? from[j] : T(0.0f);
}

template <typename T>
__device__ __forceinline__ void store(const Matrix<T>& m, const Columns<T>& from, int64_t row, int64_t col,
                                      int64_t count, bool aligned) {
  T* to = m.data + row * m.stride + col;
  if (aligned) {
    store(to, from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (j < count) to[j] = from.value[j];
}

// scale·(u - b) + b at one column, as a sum that leaves u where the scale is 1 and rounds at the size of scale·u, not of
// u, where it is small.
template <typename Wide>
__device__ __forceinline__ Wide scale_around_bias(Wide u, Wide scale, Wide bias) {
  return scale * u + (1 - scale) * bias;
}

// As if it had been stored.
template <typename T, typename Wide>
__device__ __forceinline__ Wide rounded(Wide value) {
  return widen(narrow<T, Wide>(value));
}

template <typename T>
const T* vector(const std::optional<torch::stable::Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// `aligned` becomes false where the vector or the matrix allows no whole access.
template <typename T>
const T* vector(const std::optional<torch::stable::Tensor>& t, bool& aligned) {
  const T* const data = vector<T>(t);
  aligned = aligned && reinterpret_cast<uintptr_t>(data) % alignof(Columns<T>) == 0;
  return data;
}

template <typename T>
Matrix<T> matrix(const std::optional<MatrixView>& t, bool& aligned) {
  if (!t) return {nullptr, 0};
  T* data = static_cast<T*>(t->mutable_data_ptr());
  aligned = aligned && reinterpret_cast<uintptr_t>(data) % alignof(Columns<T>) == 0 &&
            t->stride(0) * sizeof(T) % alignof(Columns<T>) == 0;
  return {data, t->stride(0)};
}

}  // namespace lora_fused
