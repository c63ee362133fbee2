// The gated activation on CUDA: h = f(gate)·up, and with dh its backward in the same pass.
//
// Fused: value, slope, both gradients and h again; bound by traffic. float32 inside (float64 for
// float64), one rounding. A thread takes eight neighbouring columns, in one 16-byte access of half
// precision where every row starts on such a boundary.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../common/activation.h"
#include "../common/lora_group.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kColumns = 8;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

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

template <typename T>
struct Matrix {
  T* data;
  int64_t stride;
};

template <typename T>
__device__ __forceinline__ void load(Columns<T>& to, const Matrix<T>& m, int64_t row, int64_t col,
                                     int64_t count, bool aligned) {
  const T* from = m.data + row * m.stride + col;
  if (aligned) {
    to = *reinterpret_cast<const Columns<T>*>(from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) to.value[j] = j < count ? from[j] : T(0.0f);
}

template <typename T>
__device__ __forceinline__ void store(const Matrix<T>& m, const Columns<T>& from, int64_t row,
                                      int64_t col, int64_t count, bool aligned) {
  T* to = m.data + row * m.stride + col;
  if (aligned) {
    *reinterpret_cast<Columns<T>*>(to) = from;
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    if (j < count) to[j] = from.value[j];
}

template <typename T>
struct Arguments {
  Matrix<T> gate, up, h, dh, dgate, dup;
  int64_t cols, blocks, total;
  bool aligned;
};

template <typename T, int kActivation, bool kBackward>
__global__ void __launch_bounds__(kThreads) gated_kernel(const __grid_constant__ Arguments<T> a) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = i / a.blocks, col = kColumns * (i - row * a.blocks);
    const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
    const bool aligned = a.aligned && count == kColumns;
    Columns<T> gate, up, h, dh, dgate, dup;
    load(gate, a.gate, row, col, count, aligned);
    load(up, a.up, row, col, count, aligned);
    if (kBackward) load(dh, a.dh, row, col, count, aligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide u = widen(up.value[j]);
      Wide value, slope;
      lora_fused::value_and_slope<Wide>(widen(gate.value[j]), kActivation, value, slope);
      h.value[j] = narrow<T, Wide>(value * u);
      if (kBackward) {
        const Wide d = widen(dh.value[j]);
        dgate.value[j] = narrow<T, Wide>(slope * u * d);
        dup.value[j] = narrow<T, Wide>(value * d);
      }
    }
    store(a.h, h, row, col, count, aligned);
    if (kBackward) {
      store(a.dgate, dgate, row, col, count, aligned);
      store(a.dup, dup, row, col, count, aligned);
    }
  }
}

template <typename T>
Matrix<T> matrix(const std::optional<Tensor>& t, bool& aligned) {
  if (!t) return {nullptr, 0};
  T* data = static_cast<T*>(t->mutable_data_ptr());
  aligned = aligned && reinterpret_cast<uintptr_t>(data) % alignof(Columns<T>) == 0 &&
            t->stride(0) * sizeof(T) % alignof(Columns<T>) == 0;
  return {data, t->stride(0)};
}

template <typename T, int kActivation>
void launch(const Arguments<T>& a, unsigned grid, bool backward, cudaStream_t stream) {
  if (backward)
    gated_kernel<T, kActivation, true><<<grid, kThreads, 0, stream>>>(a);
  else
    gated_kernel<T, kActivation, false><<<grid, kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const lora_fused::Gated& g, cudaStream_t stream) {
  bool aligned = true;
  Arguments<T> a{matrix<T>(g.gate, aligned),  matrix<T>(g.up, aligned),
                 matrix<T>(g.h, aligned),     matrix<T>(g.dh, aligned),
                 matrix<T>(g.dgate, aligned), matrix<T>(g.dup, aligned)};
  a.aligned = aligned;
  a.cols = g.h.size(1);
  a.blocks = (a.cols + kColumns - 1) / kColumns;
  a.total = g.h.size(0) * a.blocks;
  if (a.total == 0) return;
  const unsigned grid =
      static_cast<unsigned>(std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks));
  const bool backward = g.dh.has_value();
  switch (g.activation) {
    case lora_fused::kSilu: return launch<T, lora_fused::kSilu>(a, grid, backward, stream);
    case lora_fused::kGelu: return launch<T, lora_fused::kGelu>(a, grid, backward, stream);
    case lora_fused::kGeluTanh: return launch<T, lora_fused::kGeluTanh>(a, grid, backward, stream);
    case lora_fused::kRelu: return launch<T, lora_fused::kRelu>(a, grid, backward, stream);
    default: return launch<T, lora_fused::kRelu2>(a, grid, backward, stream);
  }
}

}  // namespace

void lora_fused::gated_cuda(const Gated& g) {
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(g.h.get_device_index(), &stream_ptr));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_ptr);
  switch (g.h.scalar_type()) {
    case ScalarType::Float: return run<float>(g, stream);
    case ScalarType::Double: return run<double>(g, stream);
    case ScalarType::BFloat16: return run<__nv_bfloat16>(g, stream);
    default: return run<__half>(g, stream);
  }
}
