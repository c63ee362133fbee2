// The gated activation on CUDA: h = f(gate)·up, and with dh its backward in the same pass.
//
// gate, up, h, dh, dgate and dup [M, I] of one dtype, rows contiguous and strided or not; scales [I] in float32
// (float64 for float64), biases [I] in the dtype. h = f(gate)·up; dgate = dh·up·f'(gate), dup = dh·f(gate).
//
// Fused: DoRA's scale of gate and up, value, slope, both gradients and h again; bound by traffic. float32 inside
// (float64 for float64), one rounding. A thread takes eight neighbouring columns, in one 16-byte access of half
// precision where every row starts on such a boundary. That is a kernel of its own: one for both kinds of access would
// hold registers for both.
#pragma once

#include "../../common/activation.h"
#include "dtype.cuh"
#include "vector_access.cuh"

namespace lora_fused::gated_activation {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename T>
struct Arguments {
  using W = Wide<T>;
  Matrix<T> gate, up, h, dh, dgate, dup;
  const W *gate_scale, *up_scale;
  const T *gate_bias, *up_bias;
  int64_t cols, blocks, total, activation;
};

// Eight unscaled columns become scaled ones.
template <bool kAligned, typename T, typename W>
__device__ __forceinline__ void scale_all(W (&x)[kColumns], const W* scale, const T* bias, int64_t col, int64_t cols) {
  Columns<W> by;
  load(by, Matrix<W>{const_cast<W*>(scale), 0}, 0, col, cols - col, kAligned);
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    x[j] = rounded<T>(scale_around_bias<T>(x[j], by.value[j], bias, min(col + j, cols - 1)));
}

constexpr int kAny = -1;  // the activation is read from the arguments

template <typename T, int kActivation, bool kBackward, bool kAligned>
__global__ void __launch_bounds__(kThreads) gated_activation_kernel(const __grid_constant__ Arguments<T> a) {
  using W = Wide<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = quotient(i, a.blocks), col = kColumns * (i - row * a.blocks);
    const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
    Columns<T> gate, up, h, dh, dgate, dup;
    load(gate, a.gate, row, col, count, kAligned);
    load(up, a.up, row, col, count, kAligned);
    if (kBackward) load(dh, a.dh, row, col, count, kAligned);
    W g[kColumns], u[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) g[j] = widen(gate.value[j]), u[j] = widen(up.value[j]);
    if (a.gate_scale != nullptr) scale_all<kAligned>(g, a.gate_scale, a.gate_bias, col, a.cols);
    if (a.up_scale != nullptr) scale_all<kAligned>(u, a.up_scale, a.up_bias, col, a.cols);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {  // without a branch, so that no element waits for another
      W value, slope;
      value_and_slope<W>(g[j], kActivation == kAny ? a.activation : kActivation, value, slope);
      h.value[j] = narrow<T, W>(value * u[j]);
      if (kBackward) {
        const W d = widen(dh.value[j]);
        dgate.value[j] = narrow<T, W>(slope * u[j] * d);
        dup.value[j] = narrow<T, W>(value * d);
      }
    }
    store(a.h, h, row, col, count, kAligned);
    if (kBackward) {
      store(a.dgate, dgate, row, col, count, kAligned);
      store(a.dup, dup, row, col, count, kAligned);
    }
  }
}

}  // namespace lora_fused::gated_activation
