// The tensor-core kernel of column_norm: one pass over W, its sums as gram.h has them.
//
// A block owns kCols columns, a warp an eighth of them, and walks through every gridDim.y-th tile of
// kRows rows. W and A reach shared memory by cp.async in a ring of kStages tiles; A's fragments are made one tile
// ahead of their use, so that a tile costs one barrier. A float32 A enters in two parts where kSplitA,
// for small vocabularies; over a large one its rounding averages out.
#pragma once

#include "gram.h"

namespace lora_fused {
namespace column_norm {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// kSteps: blocks of 16 ranks. Columns are as many as leave the sums of A·W room in registers, rows as many
// as make 16 KiB of W, stages as many as fit 99 KiB, all that small GPUs have.
template <typename W, typename P, int kSteps, bool kSplit>
struct Shape {
  static constexpr bool kSplitA = kSplit;
  static constexpr int kTiles = kSteps <= 2 ? 8 : 4;  // 8 columns each, of a warp
  static constexpr int kCols = kWarps * kTiles * 8, kWBytes = 16384, kRows = kWBytes / 2 / kCols;
  using A = AdapterTile<W, P, kSteps, kRows, kSplit>;
  using Share = GramShare<kSteps, kWarps>;
  static constexpr int kStages = kSteps <= 2 ? 4 : 3, kStageBytes = kWBytes + A::kBytes;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kGramSize = A::kRanks * A::kRanks;
};

struct Args {
  float *partial, *grams;  // [gridDim.y, h]; [copies of a block, gridDim.y, r, r], r in whole blocks of 16
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
  S::A::template load<kThreads>(reinterpret_cast<P*>(stage + S::kWBytes), static_cast<const P*>(p.a), first, p.v, p.r,
                                p.a_vector);
}

// What a warp sums: |w|² of column lane / 4 of each tile, A w as [16, 8] products, a share of A Aᵀ.
template <typename S>
struct Sums {
  static constexpr int kSteps = S::A::kRanks / 16;
  float squares[S::kTiles] = {}, cross[S::kTiles][kSteps][4] = {}, gram[S::Share::kGrams][2][4] = {};
};

// Adds 16 rows of a tile, the block's `turn`-th. `parts` and `low_parts` hold A's fragments at those rows.
template <typename W, typename S>
__device__ __forceinline__ void add_slab(Sums<S>& sums, uint32_t w_tile, int slab, int turn,
                                         const uint4 (*parts)[32], const uint4 (*low_parts)[32]) {
  using Share = typename S::Share;
  constexpr int kSteps = Sums<S>::kSteps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t a[kSteps][4], a_low[S::kSplitA ? kSteps : 1][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    *reinterpret_cast<uint4*>(a[step]) = parts[step][lane];
    if constexpr (S::kSplitA) *reinterpret_cast<uint4*>(a_low[step]) = low_parts[step][lane];
  }
#pragma unroll
  for (int two = 0; two < S::kTiles; two += 2) {
    const int row = slab * 16 + lane % 16, chunk = warp * S::kTiles + two + lane / 16;
    uint32_t bits[4];  // rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
    load_matrices<true>(bits, w_tile + (row * (S::kCols / 8) + (chunk ^ (row & 7))) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t b0 = bits[2 * i], b1 = bits[2 * i + 1];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (S::kSplitA) multiply<W>(sums.cross[two + i][step], a_low[step], b0, b1);
        multiply<W>(sums.cross[two + i][step], a[step], b0, b1);
      }
      sums.squares[two + i] = add_square(add_square(sums.squares[two + i], pair(b0, W())), pair(b1, W()));
    }
  }
  if (blockIdx.x > 0 || turn % Share::kCopies != Share::copy(warp)) return;
#pragma unroll
  for (int i = 0; i < Share::kGrams; ++i)
    add_gram<W, S::kSplitA>(sums.gram[i], parts, low_parts, Share::row_step(warp, i), Share::col_step(warp, i));
}

template <typename W, typename P, typename S, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) column_norm_fwd_kernel(const Args p) {
  using A = typename S::A;
  using Share = typename S::Share;
  constexpr int kSteps = Sums<S>::kSteps;
  extern __shared__ __align__(128) char smem[];
  __shared__ float squares_of[S::kCols], cross_of[S::kCols];
  __shared__ uint4 parts[2][A::kParts][32], low_parts[2][A::kLowParts][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col0 = blockIdx.x * S::kCols, count = (p.tiles - static_cast<int>(blockIdx.y) + gridDim.y - 1) / gridDim.y;
  const auto load = [&](int i) {
    if (i < count)
      load_tile<P, S>(smem + i % S::kStages * S::kStageBytes, p, (blockIdx.y + int64_t{i} * gridDim.y) * S::kRows, col0);
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  };
  const auto make_parts = [&](int i) {
    const char* a = smem + i % S::kStages * S::kStageBytes + S::kWBytes;
    A::template make_parts<kWarps>(parts[i % 2], low_parts[i % 2], reinterpret_cast<const P*>(a));
  };

  Sums<S> sums;
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) load(i);
  asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 2) : "memory");
  __syncthreads();
  make_parts(0);
  for (int i = 0; i < count; ++i) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(S::kStages - 3) : "memory");
    __syncthreads();  // tile i + 1 and the fragments of tile i are there, tile i - 1 is done with
    load(i + S::kStages - 1);
    if (i + 1 < count) make_parts(i + 1);
    const uint32_t w_tile = shared_address(smem + i % S::kStages * S::kStageBytes);
#pragma unroll
    for (int slab = 0; slab < A::kSlabs; ++slab)
      add_slab<W, S>(sums, w_tile, slab, i * A::kSlabs + slab, parts[i % 2] + slab * kSteps,
                     low_parts[i % 2] + (S::kSplitA ? slab * kSteps : 0));
  }

  if (blockIdx.x == 0) {
    float* grams = p.grams + (Share::copy(warp) * gridDim.y + blockIdx.y) * S::kGramSize;
#pragma unroll
    for (int i = 0; i < Share::kGrams; ++i)
      store_gram<A::kRanks>(grams, sums.gram[i], Share::row_step(warp, i), Share::col_step(warp, i));
  }
  const P* b = static_cast<const P*>(p.b);
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    const int tile_col = (warp * S::kTiles + tile) * 8;
    float square = sums.squares[tile];
    for (int offset = 1; offset < 4; offset *= 2)
      square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (lane % 4 == 0) squares_of[tile_col + lane / 4] = square;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = tile_col + lane % 4 * 2 + i, col = col0 + at;
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
      if (lane < 4) cross_of[at] = cross;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < S::kCols && col0 + at < p.h; at += kThreads)
    p.partial[int64_t{blockIdx.y} * p.h + col0 + at] = fmaf(2.0f * p.scaling, cross_of[at], squares_of[at]);
}

}  // namespace column_norm
}  // namespace lora_fused
