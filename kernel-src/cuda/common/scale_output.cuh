// DoRA's scale of an output on CUDA, and its backward with the sums over tokens.
//
//   forward    y = scale∘(u - b) + b, y = (scale - 1)∘u, or y += (scale - 1)∘u
//   backward   dunscaled = scale∘dy, dmagnitude = Σ dy∘(u - b) / norm, dbias = Σ dy: dy and u are read once
//
// Bound by traffic. The passes of a group's members are one launch: a block of the backward owns 256 columns of one of
// them and a share of the tokens; a second kernel adds the shares in order, so sums are deterministic.
#pragma once

#include <algorithm>

#include "../../common/kernels.h"
#include "dtype.cuh"
#include "vector_access.cuh"

namespace lora_fused::scale_output {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename T>
struct ScaleArguments {
  Matrix<T> unscaled, y;
  const Wide<T>* scale;
  const T* bias;
  int64_t cols, blocks, total;
  ScaleOutput::Form form;
};

// kAligned: rows of whole accesses. A thread for every eight neighbouring columns, which is faster than blocks that own
// columns.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) scale_output_fwd_kernel(const __grid_constant__ ScaleArguments<T> a) {
  const bool has_bias = a.bias != nullptr;
  const Wide<T> less = a.form == ScaleOutput::kScale && !has_bias ? 0 : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = quotient(i, a.blocks), col = kColumns * (i - row * a.blocks), count = a.cols - col;
    Columns<T> u, y, bias{};
    Columns<Wide<T>> scale;
    load(u, a.unscaled, row, col, count, kAligned);
    if (a.form == ScaleOutput::kAddExcess) load(y, a.y, row, col, count, kAligned);
    load(scale, Matrix<Wide<T>>{const_cast<Wide<T>*>(a.scale), 0}, 0, col, count, kAligned);
    if (has_bias) load(bias, Matrix<T>{const_cast<T*>(a.bias), 0}, 0, col, count, kAligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide<T> value = widen(u.value[j]);
      Wide<T> result = (value - widen(bias.value[j])) * (scale.value[j] - less);
      if (a.form == ScaleOutput::kAddExcess) result += widen(y.value[j]);
      if (has_bias) result += value;
      y.value[j] = narrow<T, Wide<T>>(result);
    }
    store(a.y, y, row, col, count, kAligned);
  }
}

// One pass. Columns from `column` on of the shares [shares, columns of all passes] are its own.
template <typename T>
struct Pass {
  Matrix<T> dy, unscaled, dunscaled;
  const Wide<T>*scale, *norm;
  const T* bias;
  Wide<T>*dmagnitude, *dbias;  // [N]
  int64_t cols, column;
};

constexpr int kPasses = 8;  // of one launch

template <typename T>
struct SumArguments {
  Pass<T> pass[kPasses];
  Wide<T>*dot_shares, *sum_shares;
  int64_t rows, columns, shares, share_rows;
};

constexpr int kWarps = kThreads / 32, kBlockColumns = 32 * kColumns;

// kAligned: rows of whole accesses. Bound by memory where four blocks of half precision share a multiprocessor, which
// beat more rows loaded ahead by fewer blocks.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 4 : 1)
    scale_output_bwd_kernel(const __grid_constant__ SumArguments<T> all) {
  __shared__ Wide<T> shared[kWarps][kBlockColumns];
  const Pass<T>& a = all.pass[blockIdx.z];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockColumns, col = first + lane * kColumns;
  if (first >= a.cols) return;
  const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
  const bool has_unscaled = a.unscaled.data != nullptr, has_scale = a.scale != nullptr;
  Wide<T> dots[kColumns] = {}, sums[kColumns] = {}, scale[kColumns];
  Columns<T> bias;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int64_t at = min(col + j, a.cols - 1);
    scale[j] = has_scale ? a.scale[at] : Wide<T>(1);
    bias.value[j] = a.bias != nullptr ? a.bias[at] : T(0.0f);
  }
  const int64_t start = blockIdx.y * all.share_rows, stop = min(start + all.share_rows, all.rows);
  if (count > 0) {
    for (int64_t row = start + warp; row < stop; row += kWarps) {
      Columns<T> dy, u, dunscaled;
      load(dy, a.dy, row, col, count, kAligned);
      if (has_unscaled) load(u, a.unscaled, row, col, count, kAligned);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Wide<T> d = widen(dy.value[j]);
        sums[j] += d;
        if (has_unscaled) dots[j] += d * (widen(u.value[j]) - widen(bias.value[j]));
        dunscaled.value[j] = narrow<T, Wide<T>>(d * scale[j]);
      }
      if (a.dunscaled.data != nullptr) store(a.dunscaled, dunscaled, row, col, count, kAligned);
    }
  }
  const auto reduce = [&](const Wide<T>(&mine)[kColumns], Wide<T>* shares) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) shared[warp][lane * kColumns + j] = mine[j];
    __syncthreads();
    Wide<T> total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w][threadIdx.x];
    if (first + threadIdx.x < a.cols) shares[blockIdx.y * all.columns + a.column + first + threadIdx.x] = total;
    __syncthreads();
  };
  if (a.dmagnitude != nullptr) reduce(dots, all.dot_shares);
  if (a.dbias != nullptr) reduce(sums, all.sum_shares);
}

constexpr int kReduceColumns = 32, kReduceParts = kThreads / kReduceColumns;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_output_bwd_reduce_kernel(const __grid_constant__ SumArguments<T> all) {
  __shared__ Wide<T> shared[2][kReduceParts][kReduceColumns];
  const Pass<T>& a = all.pass[blockIdx.y];
  const int lane = threadIdx.x % kReduceColumns, part = threadIdx.x / kReduceColumns;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kReduceColumns + lane;
  Wide<T> dots = 0, sums = 0;
  for (int64_t share = part; col < a.cols && share < all.shares; share += kReduceParts) {
    const int64_t at = share * all.columns + a.column + col;
    if (a.dmagnitude != nullptr) dots += all.dot_shares[at];
    if (a.dbias != nullptr) sums += all.sum_shares[at];
  }
  shared[0][part][lane] = dots;
  shared[1][part][lane] = sums;
  __syncthreads();
  if (part != 0 || col >= a.cols) return;
  for (int i = 1; i < kReduceParts; ++i) {
    dots += shared[0][i][lane];
    sums += shared[1][i][lane];
  }
  if (a.dmagnitude != nullptr) a.dmagnitude[col] = dots / a.norm[col];
  if (a.dbias != nullptr) a.dbias[col] = sums;
}

}  // namespace lora_fused::scale_output
