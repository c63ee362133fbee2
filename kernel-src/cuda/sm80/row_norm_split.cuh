// What row_norm.cu runs before and after the product of row_norm.cuh, all norms of a group in one launch each.
//
//   split    A [R, K] and B [N, R] of any of the three dtypes as hi and lo of fp16, each times a power of two of its
//            column or row that keeps both in range; ranks and columns are padded with zeros to whole steps and tiles
//   finish   norm [N] = the root of a row's partial sums, and magnitude / norm where there is a magnitude
#pragma once

#include <cstdint>

#include "../../common/mag_norm_scale.h"
#include "row_norm.cuh"

namespace lora_fused {

struct Matrix {  // row-major
  const void* data;
  int dtype;
  int64_t rows, cols;
};

__device__ __forceinline__ float load(const Matrix& m, int64_t row, int64_t col) {
  if (row >= m.rows || col >= m.cols) return 0.0f;
  return load_as_float(m.data, m.dtype, row * m.cols + col);
}

// Exponent that brings `largest` to [2^14, 2^15), near the top of fp16.
__device__ __forceinline__ int exponent_for(float largest) {
  return largest > 0.0f && isfinite(largest) ? min(14 - ilogbf(largest), 126) : 0;
}

// x·2^exponent as the sum of two fp16 numbers.
__device__ __forceinline__ void split(float x, int exponent, __half* hi, __half* lo) {
  const float scaled = ldexpf(x, exponent);
  *hi = __float2half(scaled);
  *lo = __float2half(isfinite(scaled) ? scaled - __half2float(*hi) : 0.0f);
}

// A and B of one norm as hi and lo: a_split [2·ranks, lda], lo above hi; b_split [n, 2·ranks], hi,
// then lo.
struct Split {
  __half *a_split, *b_split;
  float *col_scale, *row_scale;
  Matrix a, b;
  int64_t ranks, lda;
};

struct SplitBatch {
  Split of[kNorms];
};

// Of norm blockIdx.y. The first lda / 32 blocks split 32 columns of A each, the others 8 rows of B.
static __global__ void __launch_bounds__(256) row_norm_split_kernel(const __grid_constant__ SplitBatch batch) {
  const Split& s = batch.of[blockIdx.y];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t a_blocks = s.lda / 32;
  if (blockIdx.x < a_blocks) {
    __shared__ float largest[8][32];
    const int64_t col = blockIdx.x * int64_t{32} + x;
    float top = 0.0f;
    for (int64_t r = y; r < s.a.rows; r += 8) top = fmaxf(top, fabsf(load(s.a, r, col)));
    largest[y][x] = top;
    __syncthreads();
    for (int i = 0; i < 8; ++i) top = fmaxf(top, largest[i][x]);
    const int exponent = exponent_for(top);
    if (y == 0) s.col_scale[col] = ldexpf(1.0f, -exponent);
    for (int64_t r = y; r < s.ranks; r += 8)
      split(load(s.a, r, col), exponent, s.a_split + (s.ranks + r) * s.lda + col, s.a_split + r * s.lda + col);
  } else {
    const int64_t row = (blockIdx.x - a_blocks) * 8 + y;
    if (row >= s.b.rows) return;
    float top = 0.0f;
    for (int64_t r = x; r < s.b.cols; r += 32) top = fmaxf(top, fabsf(load(s.b, row, r)));
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const int exponent = exponent_for(top);
    if (x == 0) s.row_scale[row] = ldexpf(1.0f, -exponent);
    for (int64_t r = x; r < s.ranks; r += 32) {
      __half* hi = s.b_split + row * 2 * s.ranks + r;
      split(load(s.b, row, r), exponent, hi, hi + s.ranks);
    }
  }
}

struct Finish {
  float *norm, *mag_norm_scale;
  const float *magnitude, *partial;  // no magnitude: no scale
  int64_t n, row_blocks, col_tiles, blocks;
  float unit;  // of mag_norm_scale_of
};

struct FinishBatch {
  Finish of[kNorms];
};

// Of norm blockIdx.y: the root of each row's partial sums, added in the order of the blocks that made
// them, and the scale.
static __global__ void row_norm_finish_kernel(const __grid_constant__ FinishBatch batch) {
  const Finish& f = batch.of[blockIdx.y];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= f.n) return;
  const int64_t row_block = row / kRows, tiles = f.row_blocks * f.col_tiles;
  const int64_t tile = row_block * f.col_tiles;
  float total = 0.0f;
  if (tiles > 0) {
    const int64_t first = ((tile + 1) * f.blocks - 1) / tiles;
    const int64_t last = ((tile + f.col_tiles) * f.blocks - 1) / tiles;
    for (int64_t b = first; b <= last; ++b) total += f.partial[(b + row_block) * kRows + row % kRows];
  }
  const float norm = sqrtf(total);
  f.norm[row] = norm;
  if (f.magnitude != nullptr) f.mag_norm_scale[row] = mag_norm_scale_of<float>(f.magnitude[row], norm, f.unit);
}

}  // namespace lora_fused
