// DoRA's scale of an output on CUDA, and its backward with the sums over tokens.
//
//   forward    y = scale∘u + (1 - scale)∘b, y = (scale - 1)∘u, or y += (scale - 1)∘u
//   backward   dunscaled = scale∘dy, dmagnitude = Σ dy∘(u - b) / norm, dbias = Σ dy: dy and u are read once
//
// Bound by traffic. The passes of a group's members are one launch. Threads own columns and a share of the rows
// (column_sums.cuh), so that scale and bias are read once.
#pragma once

#include "../../common/kernels.h"
#include "column_sums.cuh"
#include "dtype.cuh"
#include "vector_access.cuh"

namespace lora_fused::scale_output {

template <typename T>
struct ScaleArguments {
  Matrix<T> unscaled, y;
  const Wide<T>* scale;
  const T* bias;
  RowShares cut;
  ScaleOutput::Form form;
};

// kAligned: rows of whole accesses.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads) scale_output_fwd_kernel(const __grid_constant__ ScaleArguments<T> a) {
  const OwnedColumns own(a.cut);
  if (own.count <= 0) return;
  const Wide<T> less = a.form == ScaleOutput::kScale ? 0 : 1;
  Columns<Wide<T>> scale;
  Columns<T> bias{};
  load(scale, a.scale, own, kAligned);
  if (a.bias != nullptr) load(bias, a.bias, own, kAligned);
  for (int64_t row = own.share; row < a.cut.rows; row += a.cut.shares) {
    Columns<T> u, y;
    load(u, a.unscaled, row, own.col, own.count, kAligned);
    if (a.form == ScaleOutput::kAddExcess) load(y, a.y, row, own.col, own.count, kAligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide<T> by = scale.value[j] - less;
      Wide<T> result = scale_around_bias(widen(u.value[j]), by, widen(bias.value[j]));
      if (a.form == ScaleOutput::kAddExcess) result += widen(y.value[j]);
      y.value[j] = narrow<T, Wide<T>>(result);
    }
    store(a.y, y, row, own.col, own.count, kAligned);
  }
}

template <typename T>
struct Pass {
  Matrix<T> dy, unscaled, dunscaled;
  const Wide<T>* scale;
  const T* bias;
  RowShares cut;
};

template <typename T>
struct SumArguments {
  Pass<T> pass[kMostSums];
  ColumnSums<Wide<T>> sums;
};

// kAligned: rows of whole accesses. A pass for each y of the grid.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads, sizeof(T) == 2 ? dispatch::kScaleBackwardBlocks : 1)
    scale_output_bwd_kernel(const __grid_constant__ SumArguments<T> all) {
  const Pass<T>& a = all.pass[blockIdx.y];
  const ColumnSum<Wide<T>>& sum = all.sums.of[blockIdx.y];
  const OwnedColumns own(a.cut);
  if (own.count <= 0) return;
  const bool has_unscaled = a.unscaled.data != nullptr;
  Wide<T> dots[kColumns] = {}, sums[kColumns] = {};
  Columns<Wide<T>> scale;
  Columns<T> bias{};
  load_or_one(scale, a.scale, own, kAligned);
  if (a.bias != nullptr) load(bias, a.bias, own, kAligned);
  for (int64_t row = own.share; row < a.cut.rows; row += a.cut.shares) {
    Columns<T> dy, u, dunscaled;
    load(dy, a.dy, row, own.col, own.count, kAligned);
    if (has_unscaled) load(u, a.unscaled, row, own.col, own.count, kAligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide<T> d = widen(dy.value[j]);
      sums[j] += d;
      if (has_unscaled) dots[j] += d * (widen(u.value[j]) - widen(bias.value[j]));
      dunscaled.value[j] = narrow<T, Wide<T>>(d * scale.value[j]);
    }
    if (a.dunscaled.data != nullptr) store(a.dunscaled, dunscaled, row, own.col, own.count, kAligned);
  }
  if (sum.dmagnitude != nullptr) store_share(all.sums.dots, all.sums, sum.column, own, dots, kAligned);
  if (sum.dbias != nullptr) store_share(all.sums.sums, all.sums, sum.column, own, sums, kAligned);
}

}  // namespace lora_fused::scale_output
