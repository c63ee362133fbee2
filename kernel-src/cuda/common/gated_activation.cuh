// The gated activation on CUDA: h = f(gate)·up, and with dh its backward in the same pass.
//
// gate, up, h, dh, dgate and dup [M, I] of one dtype, rows contiguous and strided or not; scales [I] in float32
// (float64 for float64), biases [I] in the dtype. h = f(gate)·up; dgate = dh·up·f'(gate), dup = dh·f(gate).
//
// Fused: DoRA's scale of gate and up, value, slope, both gradients and h again, and of gradients that are scaled as well
// their sums over tokens; bound by traffic. float32 inside (float64 for float64), rounded where a tensor would have been
// stored. A thread takes eight neighbouring columns, in one 16-byte access of half precision where every row starts on
// such a boundary. That is a kernel of its own: one for both kinds of access would hold registers for both. Threads own
// columns and a share of the rows (column_sums.cuh): without a scale one row.
#pragma once

#include "../../common/activation.h"
#include "column_sums.cuh"
#include "dtype.cuh"
#include "vector_access.cuh"

namespace lora_fused::gated_activation {

// What is made. "Scaled": of gate, up or both as they are scaled. "Summed": so is the backward, whose gradients are those
// of the unscaled ones, with their sums over tokens.
enum Form { kForward, kScaledForward, kBackward, kScaledBackward, kSummedBackward };

template <Form kForm>
constexpr bool kIsScaled = kForm != kForward && kForm != kBackward;

template <typename T>
struct Arguments {
  using W = Wide<T>;
  Matrix<T> gate, up, h, dh, dgate, dup;
  const W *gate_scale, *up_scale;
  const T *gate_bias, *up_bias;
  RowShares cut;
  int64_t activation;
  ColumnSums<W> sums;  // of gate and up
};

// One of gate and up: what the thread keeps of its columns, which is nothing without a scale.
template <typename T, bool kScaled, bool kSummed>
struct Side {
  using W = Wide<T>;
  Columns<W> scale;
  W dots[kSummed ? kColumns : 1] = {};
  Columns<T> unscaled, bias;

  __device__ __forceinline__ Side(const W* scales, const OwnedColumns& own, bool aligned) {
    if constexpr (kScaled) load_or_one(scale, scales, own, aligned);
  }

  __device__ __forceinline__ void read(const Matrix<T>& from, const T* biases, int64_t row, const OwnedColumns& own,
                                       bool aligned) {
    load(unscaled, from, row, own.col, own.count, aligned);
    bias = {};  // read for each row: registers do not suffice to keep it
    if (kScaled && biases != nullptr) load(bias, biases, own, aligned);
  }

  // As if it had been stored.
  __device__ __forceinline__ W value(int j) const {
    const W u = widen(unscaled.value[j]);
    return kScaled ? rounded<T>(scale_around_bias(u, scale.value[j], widen(bias.value[j]))) : u;
  }

  // The gradient that is stored, of the one of the scaled value.
  __device__ __forceinline__ T gradient(int j, W of_scaled) {
    if constexpr (!kSummed) return narrow<T, W>(of_scaled);
    const W d = rounded<T>(of_scaled);
    dots[j] += d * (widen(unscaled.value[j]) - widen(bias.value[j]));
    return narrow<T, W>(d * scale.value[j]);
  }
};

constexpr int kAny = -1;  // the activation is read from the arguments

// Blocks of a multiprocessor for which the registers suffice.
template <typename T>
constexpr int least_blocks(Form form) {
  if (sizeof(T) != 2) return 1;
  return form == kScaledForward    ? dispatch::kGatedScaleBlocks
         : form == kSummedBackward ? dispatch::kGatedScaleBackwardBlocks
                                   : 1;
}

template <typename T, int kActivation, Form kForm, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, least_blocks<T>(kForm))
    gated_activation_kernel(const __grid_constant__ Arguments<T> a) {
  using W = Wide<T>;
  constexpr bool kBackwards = kForm >= kBackward, kSummed = kForm == kSummedBackward;
  const OwnedColumns own(a.cut);
  if (own.count <= 0) return;
  Side<T, kIsScaled<kForm>, kSummed> gate(a.gate_scale, own, kAligned), up(a.up_scale, own, kAligned);
  for (int64_t row = own.share; row < a.cut.rows; row += a.cut.shares) {
    Columns<T> h, dh, dgate, dup;
    gate.read(a.gate, a.gate_bias, row, own, kAligned);
    up.read(a.up, a.up_bias, row, own, kAligned);
    if (kBackwards) load(dh, a.dh, row, own.col, own.count, kAligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {  // without a branch, so that no element waits for another
      W value, slope;
      const W u = up.value(j);
      value_and_slope<W>(gate.value(j), kActivation == kAny ? a.activation : kActivation, value, slope);
      h.value[j] = narrow<T, W>(value * u);
      if (kBackwards) {
        const W d = widen(dh.value[j]);
        dgate.value[j] = gate.gradient(j, slope * u * d);
        dup.value[j] = up.gradient(j, value * d);
      }
    }
    store(a.h, h, row, own.col, own.count, kAligned);
    if (kBackwards) {
      store(a.dgate, dgate, row, own.col, own.count, kAligned);
      store(a.dup, dup, row, own.col, own.count, kAligned);
    }
  }
  if constexpr (kSummed) {
    if (a.sums.of[0].dmagnitude != nullptr)
      store_share(a.sums.dots, a.sums, a.sums.of[0].column, own, gate.dots, kAligned);
    if (a.sums.of[1].dmagnitude != nullptr)
      store_share(a.sums.dots, a.sums, a.sums.of[1].column, own, up.dots, kAligned);
  }
}

}  // namespace lora_fused::gated_activation
