// The tensor-core kernel of column_norm: one pass over W, and never B·A.
//
// For a column w of W and its row b of B the norm's square is |w|² + 2s b·(A w) + s² b·(A Aᵀ) b. A block
// owns kCols columns and walks through every gridDim.y-th tile of kRows rows; for its rows it sums
// |w|² and, on tensor cores, A w and A Aᵀ, and applies B once, at its end, in float32. So one product
// serves for any B; the terms cancel where s·B·A nearly takes W away: an error of 1e-7 of |w|². W and A reach
// shared memory by cp.async in a ring of kStages tiles; each tile of A is made fragments of W's type once
// for all warps. A float32 A is rounded to that type; its rounding averages out over a large vocabulary,
// and where kSplitA, for small ones, it enters in two parts.
#pragma once

#include "mma.h"

namespace lora_fused {
namespace column_norm {

constexpr int kThreads = 256;
constexpr int kColumnWarps = 4, kRowWarps = 2;

// kSteps: blocks of 16 ranks. Columns are as many as leave the sums of A·W room in registers.
template <typename P, int kSteps, int kTileRows, int kRing>
struct Shape {
  static constexpr int kRows = kTileRows, kStages = kRing;
  static constexpr int kTiles = kSteps <= 2 ? 8 : 4;  // 8 columns each, of a warp
  static constexpr int kCols = kColumnWarps * kTiles * 8;
  static constexpr int kRanks = kSteps * 16;
  // Rows of A lie so that a fragment's loads meet no bank conflict.
  static constexpr int kALine = kRows + 8;
  static constexpr int kWBytes = kRows * kCols * 2;
  static constexpr int kABytes = kRanks * kALine * static_cast<int>(sizeof(P));
  static constexpr int kStageBytes = kWBytes + kABytes;
  static constexpr int kBytes = kStages * kStageBytes;
};

struct Args {
  float* partial;  // [gridDim.y, h]
  const void *w, *a, *b;  // [v, h], [r, v], [h, r]
  float scaling;
  int64_t v;
  int h, r, tiles;
  bool a_vector;  // rows of A are 16-byte aligned
};

// Rows first .. first + kRows of W's columns col0 .. and of A, into one stage.
template <typename P, typename S>
__device__ __forceinline__ void load_tile(char* stage, const Args& p, int64_t first, int col0) {
  constexpr int kChunks = S::kCols / 8, kStep = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, col = col0 + chunk * 8;
  const auto* w = static_cast<const uint16_t*>(p.w);
#pragma unroll
  for (int row = threadIdx.x / kChunks; row < S::kRows; row += kStep) {
    const bool valid = first + row < p.v && col < p.h;
    const int place = row * kChunks + (chunk ^ (row & 7));
    copy_async(shared_address(stage) + place * 16,
               valid ? w + (first + row) * p.h + col : w, valid);
  }
  const P* a = static_cast<const P*>(p.a);
  P* a_tile = reinterpret_cast<P*>(stage + S::kWBytes);
  constexpr int kPer = 16 / sizeof(P), kLine = S::kRows / kPer;  // chunks of a rank
  if (p.a_vector) {
#pragma unroll
    for (int i = threadIdx.x; i < S::kRanks * kLine; i += kThreads) {
      const int rank = i / kLine, at = i % kLine * kPer;
      const bool valid = rank < p.r && first + at < p.v;
      copy_async(shared_address(a_tile + rank * S::kALine + at),
                 valid ? a + rank * p.v + first + at : a, valid);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kRanks * S::kRows; i += kThreads) {
    const int rank = i / S::kRows, at = i % S::kRows;
    const bool valid = rank < p.r && first + at < p.v;
    a_tile[rank * S::kALine + at] = valid ? a[rank * p.v + first + at] : P(0.0f);
  }
}

// Two neighbours of A in W's type, and what that leaves, in the same type.
template <typename W, typename P>
__device__ __forceinline__ uint32_t rounded(float2& rest, const P* at) {
  if constexpr (std::is_same_v<W, P>) {
    return *reinterpret_cast<const uint32_t*>(at);
  } else {
    const float2 value{static_cast<float>(at[0]), static_cast<float>(at[1])};
    const uint32_t high = pack(W(value.x), W(value.y));
    const float2 part = pair(high, W());
    rest = {value.x - part.x, value.y - part.y};
    return high;
  }
}

// What a warp sums: |w|² of column lane / 4, A w as [16, 8] products, a share of A Aᵀ.
template <typename S>
struct Sums {
  static constexpr int kSteps = S::kRanks / 16, kGrams = kSteps * kSteps / kColumnWarps;
  float squares[S::kTiles] = {}, cross[S::kTiles][kSteps][4] = {}, gram[kGrams][2][4] = {};
};

// The share of A Aᵀ that a column warp sums, as pairs of blocks of 16 ranks.
template <typename S>
__device__ __forceinline__ int2 gram_blocks(int column_warp, int i) {
  constexpr int kSteps = S::kRanks / 16;
  const int at = column_warp * Sums<S>::kGrams + i;
  return {at / kSteps, at % kSteps};
}

// Adds 16 rows of a tile. `parts` and `low_parts` hold A's fragments at those rows.
template <typename W, typename S, bool kSplitA>
__device__ __forceinline__ void add_slab(Sums<S>& sums, uint32_t w_tile, int row0, int column_warp,
                                         const uint4 (*parts)[32], const uint4 (*low_parts)[32]) {
  constexpr int kSteps = S::kRanks / 16;
  const int lane = threadIdx.x % 32;
  uint32_t a[kSteps][4], a_low[kSplitA ? kSteps : 1][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    *reinterpret_cast<uint4*>(a[step]) = parts[step][lane];
    if constexpr (kSplitA) *reinterpret_cast<uint4*>(a_low[step]) = low_parts[step][lane];
  }
#pragma unroll
  for (int two = 0; two < S::kTiles; two += 2) {
    const int row = row0 + lane % 16, chunk = column_warp * S::kTiles + two + lane / 16;
    uint32_t bits[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
    load_matrices<true>(bits, w_tile + (row * (S::kCols / 8) + (chunk ^ (row & 7))) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t b0 = bits[2 * i], b1 = bits[2 * i + 1];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (kSplitA) multiply<W>(sums.cross[two + i][step], a_low[step], b0, b1);
        multiply<W>(sums.cross[two + i][step], a[step], b0, b1);
      }
      const float2 x = pair(b0, W()), y = pair(b1, W());
      float& sum = sums.squares[two + i];
      sum = fmaf(x.x, x.x, sum), sum = fmaf(x.y, x.y, sum);
      sum = fmaf(y.x, y.x, sum), sum = fmaf(y.y, y.y, sum);
    }
  }
#pragma unroll
  for (int i = 0; i < Sums<S>::kGrams; ++i) {
    const int2 at = gram_blocks<S>(column_warp, i);
    const uint4 left = parts[at.x][lane], right = parts[at.y][lane];
    const uint32_t x[4] = {left.x, left.y, left.z, left.w};
    multiply<W>(sums.gram[i][0], x, right.x, right.z);
    multiply<W>(sums.gram[i][1], x, right.y, right.w);
    if constexpr (kSplitA) {
      const uint4 left_low = low_parts[at.x][lane], right_low = low_parts[at.y][lane];
      const uint32_t x_low[4] = {left_low.x, left_low.y, left_low.z, left_low.w};
      multiply<W>(sums.gram[i][0], x, right_low.x, right_low.z);
      multiply<W>(sums.gram[i][1], x, right_low.y, right_low.w);
      multiply<W>(sums.gram[i][0], x_low, right.x, right.z);
      multiply<W>(sums.gram[i][1], x_low, right.y, right.w);
    }
  }
}

template <typename W, typename P, typename S, int kBlocks, bool kSplitA>
__global__ void __launch_bounds__(kThreads, kBlocks) column_norm_fwd_kernel(const Args p) {
  constexpr int kSteps = S::kRanks / 16, kSlabs = S::kRows / 16, kWarps = kThreads / 32;
  extern __shared__ __align__(128) char smem[];
  __shared__ float squares_of[kRowWarps][S::kCols], cross_of[kRowWarps][S::kCols];
  __shared__ uint4 a_parts[kSlabs * kSteps][32], a_low_parts[kSplitA ? kSlabs * kSteps : 1][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column_warp = warp % kColumnWarps, row_warp = warp / kColumnWarps;
  const int warp_col = column_warp * S::kTiles * 8, col0 = blockIdx.x * S::kCols;

  Sums<S> sums;
  const int stride = gridDim.y;
  int load = blockIdx.y;
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) {
    if (load < p.tiles)
      load_tile<P, S>(smem + stage * S::kStageBytes, p, int64_t{load} * S::kRows, col0);
    load += stride;
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  }
  int slot = 0;
  for (int tile = blockIdx.y; tile < p.tiles; tile += stride) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 2) : "memory");
    __syncthreads();
    const int next = slot == 0 ? S::kStages - 1 : slot - 1;
    if (load < p.tiles)
      load_tile<P, S>(smem + next * S::kStageBytes, p, int64_t{load} * S::kRows, col0);
    load += stride;
    asm volatile("cp.async.commit_group;\n" ::: "memory");

    const char* stage = smem + slot * S::kStageBytes;
    const P* a_tile = reinterpret_cast<const P*>(stage + S::kWBytes);
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
    // A's fragments, once for all warps: ranks lane / 4 + {0, 8} by rows of the tile.
#pragma unroll
    for (int i = warp; i < kSlabs * kSteps; i += kWarps) {
      uint32_t a[4], a_low[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int rank = i % kSteps * 16 + q % 2 * 8 + lane / 4;
        const int row = i / kSteps * 16 + q / 2 * 8 + lane % 4 * 2;
        float2 rest{};
        a[q] = rounded<W>(rest, a_tile + rank * S::kALine + row);
        a_low[q] = pack(W(rest.x), W(rest.y));
      }
      a_parts[i][lane] = uint4{a[0], a[1], a[2], a[3]};
      if constexpr (kSplitA) a_low_parts[i][lane] = uint4{a_low[0], a_low[1], a_low[2], a_low[3]};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSlabs / kRowWarps; ++i) {
      const int slab = row_warp * (kSlabs / kRowWarps) + i;
      add_slab<W, S, kSplitA>(sums, shared_address(stage), slab * 16, column_warp,
                              a_parts + slab * kSteps, a_low_parts + (kSplitA ? slab * kSteps : 0));
    }
  }
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
  __syncthreads();

  // A Aᵀ of the block's rows, where the ring was: [kRowWarps, kRanks, kRanks].
  float* gram = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int i = 0; i < Sums<S>::kGrams; ++i)
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const int2 at = gram_blocks<S>(column_warp, i);
      const int row = at.x * 16 + q % 4 / 2 * 8 + lane / 4;
      const int col = at.y * 16 + q / 4 * 8 + lane % 4 * 2 + q % 2;
      gram[(row_warp * S::kRanks + row) * S::kRanks + col] = sums.gram[i][q / 4][q % 4];
    }
  const P* b = static_cast<const P*>(p.b);
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    float square = sums.squares[tile];
    for (int offset = 1; offset < 4; offset *= 2)
      square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (lane % 4 == 0) squares_of[row_warp][warp_col + tile * 8 + lane / 4] = square;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = warp_col + tile * 8 + lane % 4 * 2 + i, col = col0 + at;
      float cross = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int rank = step * 16 + half * 8 + lane / 4;
          if (col < p.h && rank < p.r)
            cross = fmaf(static_cast<float>(b[int64_t{col} * p.r + rank]),
                         sums.cross[tile][step][2 * half + i], cross);
        }
      for (int offset = 4; offset < 32; offset *= 2)
        cross += __shfl_xor_sync(0xffffffffu, cross, offset);
      if (lane < 4) cross_of[row_warp][at] = cross;
    }
  }
  __syncthreads();
  const int at = threadIdx.x, col = col0 + at;
  if (at >= S::kCols || col >= p.h) return;
  float b_of[S::kRanks], quadratic = 0.0f;
#pragma unroll
  for (int rank = 0; rank < S::kRanks; ++rank)
    b_of[rank] = rank < p.r ? static_cast<float>(b[int64_t{col} * p.r + rank]) : 0.0f;
  for (int row = 0; row < p.r; ++row) {
    float dot = 0.0f;
    const auto* line = reinterpret_cast<const float4*>(gram + row * S::kRanks);
#pragma unroll
    for (int i = 0; i < S::kRanks / 4; ++i) {
      const float4 x = line[i], y = line[i + S::kRanks * S::kRanks / 4];
      dot = fmaf(x.x + y.x, b_of[4 * i], dot), dot = fmaf(x.y + y.y, b_of[4 * i + 1], dot);
      dot = fmaf(x.z + y.z, b_of[4 * i + 2], dot), dot = fmaf(x.w + y.w, b_of[4 * i + 3], dot);
    }
    quadratic = fmaf(static_cast<float>(b[int64_t{col} * p.r + row]), dot, quadratic);
  }
  const float cross = cross_of[0][at] + cross_of[1][at];
  p.partial[int64_t{blockIdx.y} * p.h + col] =
      squares_of[0][at] + squares_of[1][at] + p.scaling * (2.0f * cross + p.scaling * quadratic);
}

// norm[h] = sqrt of the column's partial sums, added in order; rounding may leave a sum of 0 below it.
static __global__ void column_norm_finish_kernel(float* __restrict__ norm,
                                                 const float* __restrict__ partial, int h,
                                                 int splits) {
  const int col = blockIdx.x * blockDim.x + threadIdx.x;
  if (col >= h) return;
  float total = 0.0f;
  for (int i = 0; i < splits; ++i) total += partial[int64_t{i} * h + col];
  norm[col] = sqrtf(total < 0.0f ? 0.0f : total);  // NaN stays
}

}  // namespace column_norm
}  // namespace lora_fused
