// The tensor-core kernel of column_norm: one pass over W, B·A only in accumulators.
//
// A block owns kCols columns of s·B, kept in registers as mma fragments, and walks through every
// gridDim.y-th tile of kRows rows. W and A reach shared memory by cp.async in a ring of kStages
// tiles; each tile of A is made fragments of a half type once for all warps. Float32 B enters as
// two bfloat16 parts. So does A where kSplitA, for small vocabularies; over a large one its rounding
// averages out, and a third product would cost more than it gives. A thread keeps two sums for each
// of its columns: no accumulator outlives a 16×8 product.
#pragma once

#include "mma.h"

namespace lora_fused {
namespace column_norm {

constexpr int kThreads = 256;
constexpr int kColumnWarps = 4, kRowWarps = 2;

// Adapters in float32 are multiplied as bfloat16, others as they are.
template <typename P>
using Half = std::conditional_t<std::is_same_v<P, float>, __nv_bfloat16, P>;

// kSteps: blocks of 16 ranks. Columns are as many as leave B's fragments room in registers.
template <typename P, int kSteps, int kTileRows, int kRing>
struct Shape {
  static constexpr int kRows = kTileRows, kStages = kRing;
  static constexpr int kTiles = kSteps <= 2 ? 8 : 4;  // 8 columns each, of a warp
  static constexpr int kCols = kColumnWarps * kTiles * 8;
  static constexpr int kRanks = kSteps * 16;
  // Rows of A lie so that a fragment's loads meet no bank conflict.
  static constexpr int kALine = kRows + (sizeof(P) == 4 ? 4 : 8);
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

template <typename W, typename P, typename S, int kBlocks, bool kSplitA>
__global__ void __launch_bounds__(kThreads, kBlocks) column_norm_fwd_kernel(const Args p) {
  using H = Half<P>;
  constexpr bool kSplit = std::is_same_v<P, float>;
  constexpr int kSteps = S::kRanks / 16;
  extern __shared__ __align__(128) char smem[];
  constexpr int kSlabs = S::kRows / 16, kWarps = kThreads / 32;
  __shared__ float sums_of[kRowWarps][S::kCols];
  __shared__ uint4 a_parts[kSlabs * kSteps][32], a_low_parts[kSplitA ? kSlabs * kSteps : 1][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_col = warp % kColumnWarps * S::kTiles * 8, row_warp = warp / kColumnWarps;
  const int col0 = blockIdx.x * S::kCols;

  // B's fragments: ranks 2·(lane % 4) + {0, 1, 8, 9} of column lane / 4.
  uint32_t high[S::kTiles][kSteps][2], low[kSplit ? S::kTiles : 1][kSteps][2];
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = col0 + warp_col + tile * 8 + lane / 4;
        const int rank = step * 16 + half * 8 + lane % 4 * 2;
        P b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[i] = col < p.h && rank + i < p.r
                     ? static_cast<const P*>(p.b)[static_cast<int64_t>(col) * p.r + rank + i]
                     : P(0.0f);
        if constexpr (kSplit)
          split(b[0], b[1], high[tile][step][half], low[tile][step][half]);
        else
          high[tile][step][half] = pack(b[0], b[1]);
      }

  float sums[S::kTiles][2] = {};
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
    // A's fragments, once for all warps: rows lane / 4 + {0, 8} by ranks as in B.
#pragma unroll
    for (int i = warp; i < kSlabs * kSteps; i += kWarps) {
      uint32_t a[4], a_low[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int rank = i % kSteps * 16 + q / 2 * 8 + lane % 4 * 2;
        const P* at = a_tile + rank * S::kALine + i / kSteps * 16 + q % 2 * 8 + lane / 4;
        if constexpr (kSplitA)
          split(at[0], at[S::kALine], a[q], a_low[q]);
        else
          a[q] = pack(at[0], at[S::kALine]);
      }
      a_parts[i][lane] = uint4{a[0], a[1], a[2], a[3]};
      if constexpr (kSplitA) a_low_parts[i][lane] = uint4{a_low[0], a_low[1], a_low[2], a_low[3]};
    }
    __syncthreads();
#pragma unroll
    for (int slab = row_warp * (kSlabs / kRowWarps); slab < (row_warp + 1) * (kSlabs / kRowWarps);
         ++slab) {
      const int row0 = slab * 16;
      uint32_t a[kSteps][4], a_low[kSplitA ? kSteps : 1][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        *reinterpret_cast<uint4*>(a[step]) = a_parts[slab * kSteps + step][lane];
        if constexpr (kSplitA)
          *reinterpret_cast<uint4*>(a_low[step]) = a_low_parts[slab * kSteps + step][lane];
      }
#pragma unroll
      for (int two = 0; two < S::kTiles; two += 2) {
        const int row = row0 + lane % 16, chunk = warp_col / 8 + two + lane / 16;
        uint32_t bits[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
        load_matrices<false>(
            bits, shared_address(stage) + (row * (S::kCols / 8) + (chunk ^ (row & 7))) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float c[4] = {};
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            if constexpr (kSplitA)
              multiply<H>(c, a_low[step], high[two + i][step][0], high[two + i][step][1]);
            if constexpr (kSplit)
              multiply<H>(c, a[step], low[two + i][step][0], low[two + i][step][1]);
            multiply<H>(c, a[step], high[two + i][step][0], high[two + i][step][1]);
          }
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            const float2 w = pair(bits[2 * i + q], W());
            const float x = fmaf(p.scaling, c[2 * q], w.x);
            const float y = fmaf(p.scaling, c[2 * q + 1], w.y);
            sums[two + i][0] = fmaf(x, x, sums[two + i][0]);
            sums[two + i][1] = fmaf(y, y, sums[two + i][1]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[tile][i];
      for (int offset = 4; offset < 32; offset *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane < 4) sums_of[row_warp][warp_col + tile * 8 + lane * 2 + i] = sum;
    }
  __syncthreads();
  for (int col = threadIdx.x; col < S::kCols && col0 + col < p.h; col += kThreads)
    p.partial[int64_t{blockIdx.y} * p.h + col0 + col] = sums_of[0][col] + sums_of[1][col];
}

// norm[h] = sqrt of the column's partial sums, added in order.
static __global__ void column_norm_finish_kernel(float* __restrict__ norm,
                                                 const float* __restrict__ partial, int h,
                                                 int splits) {
  const int col = blockIdx.x * blockDim.x + threadIdx.x;
  if (col >= h) return;
  float total = 0.0f;
  for (int i = 0; i < splits; ++i) total += partial[int64_t{i} * h + col];
  norm[col] = sqrtf(total);
}

}  // namespace column_norm
}  // namespace lora_fused
