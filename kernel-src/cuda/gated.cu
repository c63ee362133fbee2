// The gated activation on CUDA: h = f(gate)·up, and with dh its backward in the same pass.
//
// Fused: value, slope, both gradients and h again; bound by traffic. float32 inside (float64 for
// float64), one rounding. A thread takes eight neighbouring columns, in one 16-byte access of half
// precision where every row starts on such a boundary: a kernel of its own, in which no registers serve loads of both
// kinds.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <type_traits>

#include "../common/activation.h"
#include "../common/lora_group.h"
#include "columns.h"
#include "stream.h"

namespace {

using namespace lora_fused;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename T>
struct Arguments {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Matrix<T> gate, up, h, dh, dgate, dup;
  const Wide *gate_gain, *up_gain;
  const T *gate_bias, *up_bias;
  int64_t cols, blocks, total, activation;
};

// Eight columns before the gain become those after it.
template <bool kAligned, typename T, typename Wide>
__device__ __forceinline__ void gain_all(Wide (&x)[kColumns], const Wide* gain, const T* bias, int64_t col, int64_t cols) {
  Columns<Wide> by;
  load(by, Matrix<Wide>{const_cast<Wide*>(gain), 0}, 0, col, cols - col, kAligned);
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    x[j] = rounded<T>(gained<T>(x[j], by.value[j], bias, min(col + j, cols - 1)));
}

constexpr int kAny = -1;  // the activation is read from the arguments

template <typename T, int kActivation, bool kBackward, bool kAligned>
__global__ void __launch_bounds__(kThreads) gated_kernel(const __grid_constant__ Arguments<T> a) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = i / a.blocks, col = kColumns * (i - row * a.blocks);
    const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
    Columns<T> gate, up, h, dh, dgate, dup;
    load(gate, a.gate, row, col, count, kAligned);
    load(up, a.up, row, col, count, kAligned);
    if (kBackward) load(dh, a.dh, row, col, count, kAligned);
    Wide g[kColumns], u[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) g[j] = widen(gate.value[j]), u[j] = widen(up.value[j]);
    if (a.gate_gain != nullptr) gain_all<kAligned>(g, a.gate_gain, a.gate_bias, col, a.cols);
    if (a.up_gain != nullptr) gain_all<kAligned>(u, a.up_gain, a.up_bias, col, a.cols);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {  // without a branch, so that no element waits for another
      Wide value, slope;
      value_and_slope<Wide>(g[j], kActivation == kAny ? a.activation : kActivation, value, slope);
      h.value[j] = narrow<T, Wide>(value * u[j]);
      if (kBackward) {
        const Wide d = widen(dh.value[j]);
        dgate.value[j] = narrow<T, Wide>(slope * u[j] * d);
        dup.value[j] = narrow<T, Wide>(value * d);
      }
    }
    store(a.h, h, row, col, count, kAligned);
    if (kBackward) {
      store(a.dgate, dgate, row, col, count, kAligned);
      store(a.dup, dup, row, col, count, kAligned);
    }
  }
}

template <int kActivation, bool kAligned, typename T>
void launch(const Arguments<T>& a, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(std::min((a.total + kThreads - 1) / kThreads, kMaxBlocks));
  const auto kernel = a.dh.data != nullptr ? gated_kernel<T, kActivation, true, kAligned>
                                           : gated_kernel<T, kActivation, false, kAligned>;
  kernel<<<grid, kThreads, 0, stream>>>(a);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const lora_fused::Gated& g, cudaStream_t stream) {
  bool aligned = true;
  Arguments<T> a{matrix<T>(g.gate, aligned),  matrix<T>(g.up, aligned),
                 matrix<T>(g.h, aligned),     matrix<T>(g.dh, aligned),
                 matrix<T>(g.dgate, aligned), matrix<T>(g.dup, aligned)};
  a.gate_gain = vector<typename Arguments<T>::Wide>(g.gate_gain.gain);
  a.up_gain = vector<typename Arguments<T>::Wide>(g.up_gain.gain);
  const auto on_boundary = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.cols = g.h.size(1);
  aligned = aligned && on_boundary(a.gate_gain) && on_boundary(a.up_gain) && a.cols % kColumns == 0;
  a.gate_bias = vector<T>(g.gate_gain.bias);
  a.up_bias = vector<T>(g.up_gain.bias);
  a.blocks = (a.cols + kColumns - 1) / kColumns;
  a.total = g.h.size(0) * a.blocks;
  a.activation = g.activation;
  if (a.total == 0) return;
  if (!aligned) return launch<kAny, false>(a, stream);
  static_assert(kActivations == 5, "gated: a kernel for each activation");
  switch (g.activation) {
    case lora_fused::kSilu: return launch<lora_fused::kSilu, true>(a, stream);
    case lora_fused::kGelu: return launch<lora_fused::kGelu, true>(a, stream);
    case lora_fused::kGeluTanh: return launch<lora_fused::kGeluTanh, true>(a, stream);
    case lora_fused::kRelu: return launch<lora_fused::kRelu, true>(a, stream);
    default: return launch<lora_fused::kRelu2, true>(a, stream);
  }
}

}  // namespace

void lora_fused::gated_cuda(const Gated& g) {
  const cudaStream_t stream = stream_of(g.h);
  switch (g.h.scalar_type()) {
    case ScalarType::Float: return run<float>(g, stream);
    case ScalarType::Double: return run<double>(g, stream);
    case ScalarType::BFloat16: return run<__nv_bfloat16>(g, stream);
    default: return run<__half>(g, stream);
  }
}
