// Sums over tokens by column, of kernels whose threads own columns.
//
// A thread owns eight neighbouring columns and a share of the rows. In the order of memory the threads of a share have
// a row each eight columns, then those of the next share the next row: together they read one piece of memory, and step
// down by as many rows as there are shares. What a thread adds stays in its registers to the end. A second kernel adds
// the shares in their order, so that sums are deterministic.
#pragma once

#include <algorithm>

#include "../../common/kernels.h"
#include "../../common/tensors.h"
#include "../../dispatch/device.h"
#include "../../dispatch/table.h"
#include "stream.h"
#include "vector_access.cuh"

namespace lora_fused {

constexpr int kColumnThreads = 256;  // of a block

// How rows and columns are cut. `pieces`: of eight columns, in a row.
struct RowShares {
  int64_t rows, cols, pieces, shares;

  __host__ __device__ int64_t threads() const { return shares * pieces; }
};

inline int64_t pieces_of(int64_t cols) { return (cols + kColumns - 1) / kColumns; }

inline RowShares row_shares(int64_t rows, int64_t cols, int64_t shares) {
  return {rows, cols, pieces_of(cols), std::clamp<int64_t>(shares, 1, std::max<int64_t>(1, rows))};
}

// As many shares of `columns` columns as fill every multiprocessor with so many blocks, once.
inline int64_t shares_to_fill(const MatrixView& like, int64_t columns, int blocks) {
  const int64_t threads = int64_t{multiprocessors(like.get_device_index())} * blocks * kColumnThreads;
  return threads / std::max<int64_t>(1, pieces_of(columns));
}

inline unsigned blocks_of(const RowShares& cut) {
  return static_cast<unsigned>((cut.threads() + kColumnThreads - 1) / kColumnThreads);
}

// What a thread has: rows share, share + shares, .. and `count` columns from `col` on; none beyond the last share.
struct OwnedColumns {
  int64_t share, col, count;

  __device__ __forceinline__ explicit OwnedColumns(const RowShares& cut) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
    share = quotient(at, cut.pieces);
    col = kColumns * (at - share * cut.pieces);
    count = share < cut.shares ? min(static_cast<int64_t>(kColumns), cut.cols - col) : 0;
  }
};

// Of a vector, the thread's columns.
template <typename T>
__device__ __forceinline__ void load(Columns<T>& to, const T* from, const OwnedColumns& own, bool aligned) {
  load(to, Matrix<T>{const_cast<T*>(from), 0}, 0, own.col, own.count, aligned);
}

template <typename T>
__device__ __forceinline__ void load_or_one(Columns<T>& to, const T* from, const OwnedColumns& own, bool aligned) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) to.value[j] = T(1);
  if (from != nullptr) load(to, from, own, aligned);
}

// The sums of one output: dmagnitude = dots / norm and dbias = sums, of columns from `column` on of the shares.
template <typename W>
struct ColumnSum {
  const W* norm;
  W *dmagnitude, *dbias;  // [N], or null
  int64_t cols, column;
};

constexpr int kMostSums = 8;  // of one launch

template <typename W>
struct ColumnSums {
  ColumnSum<W> of[kMostSums];
  W *dots, *sums;  // [shares, columns of all]
  int64_t shares, columns;
};

template <typename W>
__device__ __forceinline__ void store_share(W* shares, const ColumnSums<W>& all, int64_t column,
                                            const OwnedColumns& own, const W (&mine)[kColumns], bool aligned) {
  Columns<W> values;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) values.value[j] = mine[j];
  store(Matrix<W>{shares, all.columns}, values, own.share, column + own.col, own.count, aligned);
}

constexpr int kSumColumns = 32, kSumParts = kColumnThreads / kSumColumns;

// A part of the sum of one column, in order, with loads under way together.
template <typename W>
__device__ __forceinline__ W sum_of_shares(const W* column, int64_t first, int64_t shares, int64_t stride) {
  W sum = 0;
#pragma unroll 8
  for (int64_t share = first; share < shares; share += kSumParts) sum += column[share * stride];
  return sum;
}

// Blocks of so many columns; a sum for each y of the grid.
template <typename W>
__global__ void __launch_bounds__(kColumnThreads) add_shares_kernel(const __grid_constant__ ColumnSums<W> all) {
  __shared__ W shared[2][kSumParts][kSumColumns];
  const ColumnSum<W>& a = all.of[blockIdx.y];
  const int lane = threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane, at = a.column + col;
  const bool has_dots = a.dmagnitude != nullptr, has_sums = a.dbias != nullptr;
  W dots = 0, sums = 0;
  if (col < a.cols && has_dots) dots = sum_of_shares(all.dots + at, part, all.shares, all.columns);
  if (col < a.cols && has_sums) sums = sum_of_shares(all.sums + at, part, all.shares, all.columns);
  shared[0][part][lane] = dots;
  shared[1][part][lane] = sums;
  __syncthreads();
  if (part != 0 || col >= a.cols) return;
  for (int i = 1; i < kSumParts; ++i) {
    dots += shared[0][i][lane];
    sums += shared[1][i][lane];
  }
  if (has_dots) a.dmagnitude[col] = dots / a.norm[col];
  if (has_sums) a.dbias[col] = sums;
}

template <typename W>
W* vector_to_write(const MaybeTensor& t) {
  return t ? static_cast<W*>(t->mutable_data_ptr()) : nullptr;
}

// The next sum of `all`, over dy.
template <typename W>
ColumnSum<W> column_sum(const MatrixView& dy, const std::optional<ScaleOutputBackward>& pass, ColumnSums<W>& all) {
  ColumnSum<W> sum{nullptr, nullptr, nullptr, dy.size(1), all.columns};
  if (pass)
    sum.norm = vector<W>(pass->norm), sum.dmagnitude = vector_to_write<W>(pass->dmagnitude),
    sum.dbias = vector_to_write<W>(pass->dbias);
  all.columns += sum.cols;
  return sum;
}

// Memory for the shares of what is summed, and what lives as long as it.
template <typename W>
torch::stable::Tensor share_memory(ColumnSums<W>& all, int count, int64_t shares, const torch::stable::Tensor& like) {
  bool dots = false, sums = false;
  for (int i = 0; i < count; ++i) {
    dots = dots || all.of[i].dmagnitude != nullptr;
    sums = sums || all.of[i].dbias != nullptr;
  }
  const auto dtype =
      std::is_same_v<W, double> ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  all.shares = shares;
  const torch::stable::Tensor memory = empty(like, {dots + sums, shares, all.columns}, dtype);
  W* const first = static_cast<W*>(memory.mutable_data_ptr());
  all.dots = dots ? first : nullptr;
  all.sums = sums ? first + dots * shares * all.columns : nullptr;
  return memory;
}

// In column_sums.cu, for float and double.
template <typename W>
void add_shares(const ColumnSums<W>& all, int count, cudaStream_t stream);

}  // namespace lora_fused
