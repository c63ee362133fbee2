// DoRA's passes over outputs and their gradients on CUDA, and sums over tokens.
//
//   scale       y = g∘(u - b) + b, y = (g - 1)∘u, or y += (g - 1)∘u
//   token_sums  g∘dy, Σ dy∘(u - b) / norm, Σ dy: dy and u are read once
//
// Bound by traffic. The passes of a group's members are one launch: a block of token_sums owns 256 columns of one of
// them and a share of the tokens; a second kernel adds the shares in order, so sums are deterministic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../common/kernels.h"
#include "vector_access.cuh"

namespace lora_fused::scale_output {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // more work is looped over

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct ScaleArguments {
  Matrix<T> u, y;
  const Wide<T>* gain;
  const T* bias;
  int64_t cols, blocks, total;
  Scale::Form form;
};

// kAligned: rows of whole accesses. A thread for every eight neighbouring columns, which is faster than blocks that own
// columns.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) scale_fwd_kernel(const __grid_constant__ ScaleArguments<T> a) {
  const bool has_bias = a.bias != nullptr;
  const Wide<T> less = a.form == Scale::kGain && !has_bias ? 0 : 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.total; i += step) {
    const int64_t row = i / a.blocks, col = kColumns * (i - row * a.blocks), count = a.cols - col;
    Columns<T> u, y, bias{};
    Columns<Wide<T>> gain;
    load(u, a.u, row, col, count, kAligned);
    if (a.form == Scale::kAddExcess) load(y, a.y, row, col, count, kAligned);
    load(gain, Matrix<Wide<T>>{const_cast<Wide<T>*>(a.gain), 0}, 0, col, count, kAligned);
    if (has_bias) load(bias, Matrix<T>{const_cast<T*>(a.bias), 0}, 0, col, count, kAligned);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Wide<T> value = widen(u.value[j]);
      Wide<T> result = (value - widen(bias.value[j])) * (gain.value[j] - less);
      if (a.form == Scale::kAddExcess) result += widen(y.value[j]);
      if (has_bias) result += value;
      y.value[j] = narrow<T, Wide<T>>(result);
    }
    store(a.y, y, row, col, count, kAligned);
  }
}

// One pass. Columns from `column` on of the shares [shares, columns of all passes] are its own.
template <typename T>
struct Pass {
  Matrix<T> dy, u, scaled;
  const Wide<T>*gain, *norm;
  const T* bias;
  Wide<T>*dots, *sums;  // [N]
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
    token_sums_fwd_kernel(const __grid_constant__ SumArguments<T> all) {
  __shared__ Wide<T> shared[kWarps][kBlockColumns];
  const Pass<T>& a = all.pass[blockIdx.z];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockColumns, col = first + lane * kColumns;
  if (first >= a.cols) return;
  const int64_t count = min(static_cast<int64_t>(kColumns), a.cols - col);
  const bool has_u = a.u.data != nullptr, has_gain = a.gain != nullptr;
  Wide<T> dots[kColumns] = {}, sums[kColumns] = {}, gain[kColumns];
  Columns<T> bias;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int64_t at = min(col + j, a.cols - 1);
    gain[j] = has_gain ? a.gain[at] : Wide<T>(1);
    bias.value[j] = a.bias != nullptr ? a.bias[at] : T(0.0f);
  }
  const int64_t start = blockIdx.y * all.share_rows, stop = min(start + all.share_rows, all.rows);
  if (count > 0) {
    for (int64_t row = start + warp; row < stop; row += kWarps) {
      Columns<T> dy, u, scaled;
      load(dy, a.dy, row, col, count, kAligned);
      if (has_u) load(u, a.u, row, col, count, kAligned);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Wide<T> d = widen(dy.value[j]);
        sums[j] += d;
        if (has_u) dots[j] += d * (widen(u.value[j]) - widen(bias.value[j]));
        scaled.value[j] = narrow<T, Wide<T>>(d * gain[j]);
      }
      if (a.scaled.data != nullptr) store(a.scaled, scaled, row, col, count, kAligned);
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
  if (a.dots != nullptr) reduce(dots, all.dot_shares);
  if (a.sums != nullptr) reduce(sums, all.sum_shares);
}

constexpr int kReduceColumns = 32, kReduceParts = kThreads / kReduceColumns;

template <typename T>
__global__ void __launch_bounds__(kThreads) token_sums_reduce_kernel(const __grid_constant__ SumArguments<T> all) {
  __shared__ Wide<T> shared[2][kReduceParts][kReduceColumns];
  const Pass<T>& a = all.pass[blockIdx.y];
  const int lane = threadIdx.x % kReduceColumns, part = threadIdx.x / kReduceColumns;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kReduceColumns + lane;
  Wide<T> dots = 0, sums = 0;
  for (int64_t share = part; col < a.cols && share < all.shares; share += kReduceParts) {
    const int64_t at = share * all.columns + a.column + col;
    if (a.dots != nullptr) dots += all.dot_shares[at];
    if (a.sums != nullptr) sums += all.sum_shares[at];
  }
  shared[0][part][lane] = dots;
  shared[1][part][lane] = sums;
  __syncthreads();
  if (part != 0 || col >= a.cols) return;
  for (int i = 1; i < kReduceParts; ++i) {
    dots += shared[0][i][lane];
    sums += shared[1][i][lane];
  }
  if (a.dots != nullptr) a.dots[col] = dots / a.norm[col];
  if (a.sums != nullptr) a.sums[col] = sums;
}

}  // namespace lora_fused::scale_output
